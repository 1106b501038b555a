"""The stages of a recipe as a graph, and the walk over it."""
