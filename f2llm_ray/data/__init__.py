"""From raw rows to token store and batch table."""
