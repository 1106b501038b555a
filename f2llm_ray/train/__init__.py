"""Losses, the DeepSpeed loop and the Ray Train edge."""
