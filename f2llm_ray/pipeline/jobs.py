"""The jobs that make stages: scripts for `ray job submit`, one for each kind of stage."""

from __future__ import annotations

PREPARE = "jobs/prepare.py"
MINE = "jobs/mine.py"
TRAIN = "jobs/train.py"
PRUNE = "jobs/prune.py"
TEACH = "jobs/teach.py"
DISTILL = "jobs/distill.py"
QUANTIZE = "jobs/quantize.py"
EVALUATE = "jobs/evaluate.py"
