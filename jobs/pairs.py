"""`f2llm pairs` as a script, for `ray job submit`."""

from __future__ import annotations

import sys

from f2llm_ray.commands.main import job

if __name__ == "__main__":
    sys.exit(job("pairs"))
