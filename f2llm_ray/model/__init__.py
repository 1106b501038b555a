"""Shapes, the encoder, pruning and the exported model folder."""
