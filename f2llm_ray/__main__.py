"""`python -m f2llm_ray` is `f2llm`."""

from __future__ import annotations

import sys

from f2llm_ray.commands.main import main

if __name__ == "__main__":
    sys.exit(main())
