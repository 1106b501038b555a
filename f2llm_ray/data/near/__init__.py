"""Near-duplicates: shingles, MinHash signatures, candidate pairs and the groups that they make."""
