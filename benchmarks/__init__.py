"""Side by side with peers; each prints one JSON object on its last line."""
