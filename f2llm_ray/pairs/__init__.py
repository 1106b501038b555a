"""Pairs made of passages: a language model writes the queries, and what is wrong is left out."""
