"""Serving: the HTTP endpoint of one or several models, and bulk embedding of files."""
