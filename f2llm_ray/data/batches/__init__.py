"""Global batches: the tables that fix the order of training."""
