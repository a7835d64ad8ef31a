"""`config.data` for a downstream task, and the dataset of its rows."""

import functools
import hashlib
import json
import operator
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from bertjax.data.dataset import RowDataset
from bertjax.data.orders import Orders
from bertjax.data.sources import base
from bertjax.data.sources import preprocess as preprocess_lib
from bertjax.data.sources.filters import named
from bertjax.data.textual import TextualData
from bertjax.data.tokenizers import Tokenizer
from bertjax.tasks import records
from bertjax.tasks.inputs import pair_style_of
from bertjax.tasks.kinds import Features, Kind
from bertjax.tasks.table import Task, build_task


def check_seq_len(seq_len: int) -> None:
  """Raises ValueError for rows too short for two texts and what parts them."""
  if seq_len < 8:
    raise ValueError(f"data.seq_len={seq_len} must be at least 8.")


class TaskDataset(RowDataset):
  """Features in memory, in another order every epoch.

  A batch also has `index`, int32 [b]: which feature a row is, -1 for the rows
  that fill the last batch of an evaluation.
  """

  def __init__(
    self, features: Features, *, pad_id: int, seq_len: int, seed: int = 0
  ):
    """Args:
    features: rows of a split.
    pad_id: what fills rows.
    seq_len: length t of a row.
    seed: of shuffling.

    Raises:
      ValueError: no rows.
    """
    self.features = features
    self.pad_id, self.seq_len = pad_id, seq_len
    self.seed = operator.index(seed)
    self._count = len(features.arrays["labels"])
    if not self._count:
      raise ValueError("data.task has no examples in this split.")
    self._orders = Orders(self._count, self.seed)

  @functools.cached_property
  def row_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    arrays = {**self.features.arrays, "index": np.zeros(1, np.int32)}
    return {
      k: jax.ShapeDtypeStruct(v.shape[1:], v.dtype) for k, v in arrays.items()
    }

  def rows_per_epoch(self, epoch: int) -> int:
    return self._count

  def epoch_of(self, row: int) -> tuple[int, int]:
    return divmod(row, self._count)

  def tokens_per_batch(self, batch_size: int) -> int:
    return batch_size * self.features.arrays["tokens"][0].size

  def rows(self, first: int, stop: int) -> dict[str, np.ndarray]:
    """Rows `first:stop` of the endless stream of shuffled epochs."""
    index = self._orders.find(first, stop)[1].astype(np.int32)
    batch = {k: v[index] for k, v in self.features.arrays.items()}
    return {**batch, "index": index}

  def empty_rows(self, count: int) -> dict[str, np.ndarray]:
    """Rows of padding without label; a number's missing label is NaN."""
    rows = super().empty_rows(count)
    rows["index"] = np.full(count, -1, np.int32)
    if rows["labels"].dtype.kind == "f":
      rows["labels"] = np.full_like(rows["labels"], np.nan)
    return rows

  def fingerprint(self) -> str:
    return f"{self._content}-{self.seed}"

  def reseeded(self, seed: int) -> "TaskDataset":
    return TaskDataset(
      self.features, pad_id=self.pad_id, seq_len=self.seq_len, seed=seed
    )

  @functools.cached_property
  def _content(self) -> str:
    digest = hashlib.sha256()
    for name, array in sorted(self.features.arrays.items()):
      digest.update(json.dumps([name, array.shape, array.dtype.str]).encode())
      digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:16]


class TaskData(TextualData):
  """The labelled examples of a downstream task.

  Attributes:
    task: what is learned.
  """

  evaluators = ("task_metrics", "objective")

  def __init__(
    self,
    *,
    task: Mapping[str, Any],
    tokenizer: Mapping[str, Any] | Tokenizer,
    seq_len: int,
    batch_size: int,
    pair_style: str | None = None,
    train_split: str = "train",
    max_examples: int | None = None,
    preprocess: Sequence[str | Mapping[str, Any]] = (),
    seed: int,
    cache_dir: pathlib.Path,
  ):
    """Opens the source; a split is read when it is asked for.

    Args:
      task: a name of `TASKS` and its options.
      tokenizer: a name of `TOKENIZERS` and its options, or a tokenizer.
      seq_len: length of a row.
      batch_size: rows of the global batch.
      pair_style: key of `PAIR_STYLES`, as the encoder was pre-trained; None:
        as goes with the tokenizer.
      train_split: the split that is trained on.
      max_examples: read at most so many of the training split (learning
        curves, smoke tests); None reads all.
      preprocess: names of `PREPROCESSORS`, or `name` and options, that every
        text goes through; the model's own, which `bertjax.predict` applies too.
      seed: of shuffling.
      cache_dir: where a trained vocabulary lives.

    Raises:
      ValueError: names the field that does not fit.
    """
    self.seq_len = seq_len
    self.task: Task = build_task(task)
    check_seq_len(seq_len)
    self.source = records.build_source(
      self.task.source, self.task.kind.fields, "data.task.source"
    )
    self._function = None
    content = f"{self.source.fingerprint()}-{self.task.kind!r}"
    if preprocess:
      self._function = preprocess_lib.text_function(
        preprocess, "data.preprocess"
      )
      self.task.kind.prepared({}, self._function)
      content = base.fingerprint_of(
        content, preprocess_lib.VERSION, named(preprocess)
      )
    super().__init__(
      tokenizer,
      batch_size=batch_size,
      train_split=train_split,
      cache_dir=cache_dir,
      # A vocabulary also depends on which fields are read.
      fingerprint=content,
    )
    self._style = pair_style_of(self.tokenizer, pair_style)
    self._seed, self._max_examples = seed, max_examples
    self._datasets: dict[str, TaskDataset] = {}

  def texts(self) -> Iterator[str]:
    for record in self.records(self.train_split):
      yield from self.task.kind.texts(record)

  def records(self, split: str) -> list[dict[str, Any]]:
    """The examples of a split, their texts preprocessed.

    Raises:
      ValueError: a field that the task reads is missing.
    """
    found = list(self.source.examples(split))
    for record in found:
      for field in self.task.kind.fields:
        if field not in record:
          raise ValueError(
            f"{self.source.name}, split {split!r}: example {record['id']!r}"
            f" lacks {field!r}; it has {', '.join(sorted(record))}. The task"
            f" reads {', '.join(self.task.kind.fields)} (null: no label)."
          )
    if self._function is None:
      return found
    return [self.task.kind.prepared(r, self._function) for r in found]

  def dataset(self, split: str | None = None) -> TaskDataset:
    """The rows of a split; of none, those that are trained on.

    Raises:
      ValueError: unknown split, records that do not fit the task, or no label
        to learn from.
    """
    if split is None:
      found = self.dataset(self.train_split)
      if not found.features.labelled.any():
        raise ValueError(
          f"data.train_split={self.train_split!r} of {self.source.name} has no"
          f" labels in {self.task.kind.fields[-1]!r}; nothing can be learned"
          " from it."
        )
      return found
    if split not in self._datasets:
      examples = self.records(split)
      if split == self.train_split:
        examples = examples[: self._max_examples]
      features = self.task.kind.features(
        examples, self.tokenizer, self.seq_len, self._style
      )
      self._datasets[split] = TaskDataset(
        features,
        pad_id=self.tokenizer.pad_id,
        seq_len=self.seq_len,
        seed=self._seed,
      )
    return self._datasets[split]

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch, without reading data."""
    shapes = self.task.kind.row_shapes(self.seq_len) | {"index": ((), np.int32)}
    return {
      k: jax.ShapeDtypeStruct((batch_size, *shape), dtype)
      for k, (shape, dtype) in shapes.items()
    }

  def objective(self, given: Mapping[str, Any]) -> dict[str, Any]:
    """The objective that learns the task, with the options given for it."""
    return objective_of(self.task.kind, given)

  def facts(self) -> dict[str, Any]:
    features = self.dataset().features
    arrays = features.arrays
    rows = {
      hashlib.blake2b(tokens.tobytes(), digest_size=12).digest()
      for tokens in arrays["tokens"]
    }
    count = len(arrays["tokens"])
    labelled = features.labelled.reshape(count, -1).any(axis=1)
    return {
      "rows": count,
      "class_shares": self.task.kind.class_shares(features),
      "truncated_share": float(features.truncated.mean()),
      "unlabelled_share": 1.0 - float(labelled.mean()),
      "duplicate_share": 1.0 - len(rows) / count,
      "fill": float((arrays["segment_ids"] > 0).mean()),
    }

  def baseline(
    self, split: str, num_batches: int | None = None
  ) -> dict[str, float]:
    """The task's metrics if every answer is the commonest of training.

    {} where the source has nothing to train on, or no label of it.
    """
    del num_batches  # a task is scored as a whole
    if self.train_split not in self.source.splits:
      return {}
    train = self.dataset(self.train_split).features
    if not train.labelled.any():
      return {}
    kind, features = self.task.kind, self.dataset(split).features
    constant = kind.constant_logits(train)
    count = len(features.arrays["labels"])
    logits = np.broadcast_to(constant, (count, *constant.shape))
    scores = kind.score(logits, features)
    return {f"majority_{name}": value for name, value in scores.items()}


def objective_of(kind: Kind, given: Mapping[str, Any]) -> dict[str, Any]:
  """`config.objective` of a kind of task, with the options given for it.

  Raises:
    ValueError: what is given is another one, or has other classes.
  """
  known = kind.objective
  for key, value in known.items():
    if key in given and given[key] not in (value, _as_json(value)):
      raise ValueError(
        f"objective.{key}={given[key]!r} does not fit data.task, which needs"
        f" {value!r}; leave it out."
      )
  return known | dict(given)


def _as_json(value: Any) -> Any:
  return list(value) if isinstance(value, tuple) else value
