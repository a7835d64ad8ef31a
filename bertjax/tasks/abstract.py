"""The shapes of a task's batches from its config alone: no data is read."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax

from bertjax.data import abstract
from bertjax.tasks.data import TaskData, check_seq_len, objective_of
from bertjax.tasks.kinds import Kind
from bertjax.tasks.table import PUBLISHED, build_task


@dataclasses.dataclass(frozen=True)
class AbstractTask(abstract.AbstractText):
  """What `bertjax.experiment.build` asks of `TaskData`, and nothing to read.

  Attributes:
    kind: of the task.
  """

  kind: Kind

  def objective(self, given: Mapping[str, Any]) -> dict[str, Any]:
    """The objective that learns the task, with the options given for it."""
    return objective_of(self.kind, given)

  def tokens_per_batch(self, batch_size: int) -> int:
    """Slots of a batch; of choices, those of every ending."""
    return batch_size * math.prod(self.row_spec["tokens"].shape)


def abstract_task(
  spec: Mapping[str, Any], vocab_size: int | None = None
) -> AbstractTask:
  """The batches of `config.data` with a task.

  Args:
    spec: arguments of `TaskData`.
    vocab_size: of the tokenizer; by default what its options, or its files if
      they are here, say.

  Raises:
    ValueError: an option that does not fit, or a vocabulary of unknown size.
  """
  abstract.check_options(TaskData, {"tokenizer": None} | dict(spec))
  check_seq_len(spec["seq_len"])
  task = dict(spec["task"])
  if task.get("name") in PUBLISHED:
    task["source"] = {}  # not even where TFDS has none
  kind = build_task(task).kind
  shapes = kind.row_shapes(spec["seq_len"]) | {"index": ((), "int32")}
  return AbstractTask(
    batch_size=spec["batch_size"],
    row_spec={k: jax.ShapeDtypeStruct(*v) for k, v in shapes.items()},
    vocab_size=abstract.vocabulary_size(spec, vocab_size),
    seq_len=spec["seq_len"],
    kind=kind,
  )
