"""What a run is: one typed recipe, and the files it is read from."""
