"""Batches as pure functions of the step.

The global stream is a sequence of rows: all rows of epoch 0, then of epoch 1,
and so on. Global batch j holds rows j B .. (j + 1) B - 1 and process p of n
takes its contiguous slice, so the state of reading is one integer.
"""

import abc
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import grain
import jax
import numpy as np

EVALUATION_SEED = 20_181_011


class RowDataset(abc.ABC):
  """A global stream of rows, read by batches.

  Attributes:
    seq_len: length t of a row.
    pad_id: what fills rows of tokens.
    seed: of shuffling, instance making and masking.
    unit: what a row is made of, for rates.
  """

  seq_len: int
  pad_id: int = 0
  seed: int
  unit: ClassVar[str] = "tokens"

  @property
  @abc.abstractmethod
  def row_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of one row, without reading data."""

  @abc.abstractmethod
  def rows_per_epoch(self, epoch: int) -> int:
    """How many rows that epoch has."""

  @abc.abstractmethod
  def rows(self, first: int, stop: int) -> dict[str, np.ndarray]:
    """Rows `first:stop` of the global stream, a pure function."""

  @abc.abstractmethod
  def fingerprint(self) -> str:
    """Changes whenever any row of the stream could."""

  @abc.abstractmethod
  def reseeded(self, seed: int) -> "RowDataset":
    """The same data with other random choices."""

  def anchor(self, row: int) -> list[int]:
    """Small facts that make `rows(row, ...)` immediate in a new process."""
    del row
    return []

  def restore_anchor(self, anchor: list[int]) -> None:
    """Takes what `anchor` gave."""
    del anchor

  def batch_spec(self, batch_size: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a batch, without reading data."""
    return {
      k: jax.ShapeDtypeStruct((batch_size, *v.shape), v.dtype)
      for k, v in self.row_spec.items()
    }

  def tokens_per_batch(self, batch_size: int) -> int:
    """Slots of a batch, padding included."""
    return batch_size * self.seq_len

  def epoch_of(self, row: int) -> tuple[int, int]:
    """(epoch, index within it) of a row of the global stream."""
    epoch = 0
    while row >= (count := self.rows_per_epoch(epoch)):
      row -= count
      epoch += 1
    return epoch, row

  def batch(
    self,
    step: int,
    batch_size: int,
    process_index: int = 0,
    process_count: int = 1,
  ) -> dict[str, np.ndarray]:
    """One process's slice of the global batch of a step, a pure function.

    Args:
      step: number of the batch, from 0.
      batch_size: rows of the global batch.
      process_index: which contiguous slice.
      process_count: number of slices.

    Returns:
      As `batch_spec(batch_size // process_count)` says.

    Raises:
      ValueError: the batch does not divide over the processes.
    """
    local = _local_size(batch_size, process_index, process_count)
    first = step * batch_size + process_index * local
    return self.rows(first, first + local)

  def iterator(
    self,
    batch_size: int,
    start_step: int = 0,
    process_index: int = 0,
    process_count: int = 1,
    prefetch: int = 8,
    num_threads: int = 2,
  ) -> "BatchIterator":
    """Endless batches from `start_step` on, prepared by background threads.

    Args:
      batch_size: rows of the global batch.
      start_step: the first batch; starting anywhere is immediate.
      process_index: as in `batch`.
      process_count: as in `batch`.
      prefetch: batches held ready; 0 reads in the caller's thread.
      num_threads: threads that prepare them.
    """
    return BatchIterator(
      self,
      batch_size,
      start_step,
      process_index=process_index,
      process_count=process_count,
      prefetch=prefetch,
      num_threads=num_threads,
    )

  def evaluation_batches(
    self,
    batch_size: int,
    num_batches: int | None = None,
    process_index: int = 0,
    process_count: int = 1,
    seed: int = EVALUATION_SEED,
  ) -> Iterator[dict[str, np.ndarray]]:
    """Epoch 0 under a seed of its own: the same rows and masks every time.

    The last batch is filled with empty rows (segment_ids 0, labels -1), which
    weigh nothing, so each row counts once.

    Args:
      batch_size: rows of the global batch.
      num_batches: at most so many; None reads the whole epoch.
      process_index: as in `batch`.
      process_count: as in `batch`.
      seed: independent of the run's, so that runs are comparable.
    """
    local = _local_size(batch_size, process_index, process_count)
    stream = self.reseeded(seed)
    total = stream.rows_per_epoch(0)
    steps = -(-total // batch_size)
    for step in range(
      steps if num_batches is None else min(steps, num_batches)
    ):
      first = step * batch_size + process_index * local
      stop = min(first + local, total)
      parts = [stream.empty_rows(local - max(stop - first, 0))]
      if first < stop:
        parts.insert(0, stream.rows(first, stop))
      yield concatenate(parts)

  def empty_rows(self, count: int) -> dict[str, np.ndarray]:
    """Rows of padding that carry no weight."""
    empty = {"tokens": self.pad_id, "labels": -1, "pair_labels": -1}
    return {
      k: np.full((count, *v.shape), empty.get(k, 0), v.dtype)
      for k, v in self.row_spec.items()
    }


class BatchIterator:
  """Batches with a state of a few integers.

  `get_state` after batch j says "next is j + 1", whatever the threads have
  prepared meanwhile; `set_state` makes the next batch bitwise what it would
  have been. The state is JSON-able and independent of the number of processes.
  """

  def __init__(
    self,
    dataset: RowDataset,
    batch_size: int,
    start_step: int,
    *,
    process_index: int,
    process_count: int,
    prefetch: int,
    num_threads: int,
  ):
    _local_size(batch_size, process_index, process_count)
    self._dataset = dataset
    self._batch_size = batch_size
    source = _Batches(dataset, batch_size, process_index, process_count)
    options = grain.ReadOptions(
      num_threads=num_threads if prefetch else 0,
      prefetch_buffer_size=prefetch,
    )
    self._batches = iter(
      grain.MapDataset.source(source).to_iter_dataset(options)
    )
    if start_step:
      self._batches.set_state({"next_index": start_step})

  def __iter__(self) -> "BatchIterator":
    return self

  def __next__(self) -> dict[str, np.ndarray]:
    return next(self._batches)

  def get_state(self) -> dict[str, Any]:
    """`step` of the next batch, and what recognises the stream."""
    step = int(self._batches.get_state()["next_index"])
    return {
      "step": step,
      "batch_size": self._batch_size,
      "dataset": self._dataset.fingerprint(),
      "anchor": self._dataset.anchor(step * self._batch_size),
    }

  def set_state(self, state: Mapping[str, Any]) -> None:
    """Continues from a state.

    Raises:
      ValueError: the state is of another stream or another batch size.
    """
    if state["batch_size"] != self._batch_size:
      raise ValueError(
        f"data.batch_size={self._batch_size} differs from the"
        f" {state['batch_size']} of the saved iterator; keep it, or start a"
        " new stage with init_from."
      )
    if state["dataset"] != self._dataset.fingerprint():
      raise ValueError(
        "The saved iterator belongs to other data: data.* (source, tokenizer,"
        " instances, masking, seq_len) or the seed changed. Restore them, or"
        " start a new stage with init_from."
      )
    self._dataset.restore_anchor(list(state["anchor"]))
    self._batches.set_state({"next_index": int(state["step"])})

  def close(self) -> None:
    """Stops the threads."""
    self._batches.close()


class _Batches:
  """Random access to the batches of one process, for Grain."""

  def __init__(self, dataset, batch_size, process_index, process_count):
    self._read = functools.partial(
      dataset.batch,
      batch_size=batch_size,
      process_index=process_index,
      process_count=process_count,
    )

  def __len__(self) -> int:
    return 2**50  # endless: Grain wants a length

  def __getitem__(self, step) -> dict[str, np.ndarray]:
    return self._read(int(step))


def _local_size(batch_size: int, process_index: int, process_count: int) -> int:
  if batch_size < 1 or batch_size % process_count:
    raise ValueError(
      f"data.batch_size={batch_size} does not divide over {process_count}"
      f" processes; use a positive multiple of {process_count}."
    )
  if not 0 <= process_index < process_count:
    raise ValueError(
      f"process_index={process_index} must lie in 0..{process_count - 1}."
    )
  return batch_size // process_count


def concatenate(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
  """Rows of several batches, one batch after the other."""
  if len(parts) == 1:
    return parts[0]
  return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
