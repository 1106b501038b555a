"""The engine behind serving, bulk embedding and evaluation, and its HTTP face."""
