"""What `import f2llm_ray` offers to programs: short calls over what the commands use."""
