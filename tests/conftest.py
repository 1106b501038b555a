"""What all tests share."""

from __future__ import annotations

from importlib.util import find_spec

from hypothesis import settings

# A shared or slow machine makes an example late, not wrong.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# mteb needs Python 3.11.
collect_ignore = [] if find_spec("mteb") else ["evaluate/test_mteb.py", "export/test_leaderboard.py"]
