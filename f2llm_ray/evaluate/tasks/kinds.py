"""The old name of `registry`, until the pipeline imports from there."""

from f2llm_ray.evaluate.tasks.registry import read_task as read_task
from f2llm_ray.evaluate.tasks.registry import task_of as task_of
