"""f2llm_ray: train, prune, distil and serve multilingual text-embedding models on Ray."""

__version__ = "0.1.0"
