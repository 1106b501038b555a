"""Where a run lives: folders on any filesystem, inputs known by content, stages and their manifests."""
