"""Downstream tasks: a table of them, their rows, their scores.

data = TaskData(
  task=dict(name="glue/mrpc"), tokenizer=tokenizer, seq_len=128, ...
)
objective = data.task.kind.objective  # what config.objective should say
"""

from bertjax.tasks.data import TaskData, TaskDataset
from bertjax.tasks.kinds import (
  Choices,
  Features,
  Kind,
  Questions,
  Sentences,
  Tagging,
)
from bertjax.tasks.metrics import METRICS
from bertjax.tasks.records import READERS
from bertjax.tasks.table import TASKS, Task, build_task

__all__ = [
  "METRICS",
  "READERS",
  "TASKS",
  "Choices",
  "Features",
  "Kind",
  "Questions",
  "Sentences",
  "Tagging",
  "Task",
  "TaskData",
  "TaskDataset",
  "build_task",
]
