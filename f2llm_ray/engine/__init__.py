"""Tokens in, vectors out: the encoder that training, evaluation, mining, bulk and serving share."""
