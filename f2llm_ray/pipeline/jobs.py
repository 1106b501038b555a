"""The jobs that make stages, one for each kind of stage: `f2llm train`, or jobs/train.py for `ray job submit`."""

from __future__ import annotations

PREPARE = "prepare"
MINE = "mine"
TRAIN = "train"
PRUNE = "prune"
TEACH = "teach"
DISTILL = "distil"
QUANTIZE = "quantize"
EVALUATE = "evaluate"
