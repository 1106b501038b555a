"""What all tests share."""

from __future__ import annotations

import os
import tempfile
from importlib.util import find_spec

from hypothesis import settings

# A shared or slow machine makes an example late, not wrong.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# mteb needs Python 3.11.
NEED_MTEB = ["evaluate/test_mteb.py", "evaluate/test_mteb_texts.py", "export/test_leaderboard.py"]
collect_ignore = [] if find_spec("mteb") else NEED_MTEB
# Graph files that engines make of tiny models go there, for all tests of a run and the processes that they start.
_cache = tempfile.TemporaryDirectory(prefix="f2llm-cache-")
os.environ["XDG_CACHE_HOME"] = _cache.name
