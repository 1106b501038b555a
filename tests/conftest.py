"""What all tests share."""

from __future__ import annotations

from hypothesis import settings

# A shared or slow machine makes an example late, not wrong.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")
