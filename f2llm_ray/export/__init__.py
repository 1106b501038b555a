"""Model folders on their way out: what is checked and sent to the hub."""
