"""The commands: what `f2llm NAME` and the scripts in `jobs/` do. Each module has a `parser` and a `run`."""
