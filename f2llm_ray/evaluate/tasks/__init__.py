"""What models are measured on: one file per kind of task."""
