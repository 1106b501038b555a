"""Smaller models: the importance of a model's parts, pruning to a shape, int8 weights."""
