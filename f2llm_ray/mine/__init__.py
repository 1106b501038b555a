"""Hard negatives: the nearest passages of each query that are not its positives."""
