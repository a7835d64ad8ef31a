"""Is the data what the config says? Statistics of batches, and a look at rows.

A run that learns nothing often reads something odd: everything masked, all
padding, one label, the same rows again. `audit` counts what went by.
"""

import collections
import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np


def audit(
  batches: Iterable[Mapping[str, np.ndarray]], tokenizer: Any
) -> dict[str, float]:
  """Health statistics of some batches.

  Args:
    batches: batches of one dataset.
    tokenizer: for its `mask_id`.

  Returns:
    `rows`, `batches`, `fill` (share of slots that hold a token),
    `segments_per_row`, `duplicate_rows` (share of rows whose original tokens
    were seen before, empty rows aside); for masked batches `masked_rate` (of
    the real tokens, special ones included), `mask_share`, `random_share`,
    `kept_share` (a random token that hits the original counts as kept),
    `labels_per_batch` and its least and greatest value; for paired batches
    `pairs` (share of rows with a pair) and `pair_positive` (share of these
    with label 1: random next or swapped).

  Raises:
    ValueError: there are no batches.
  """
  total, labels_per_batch, seen = collections.Counter(), [], set()
  for batch in batches:
    counts = _counts(batch, tokenizer, seen)
    total.update(counts)
    labels_per_batch.append(counts["labels"])
  if not labels_per_batch:
    raise ValueError("audit needs at least one batch; the stream is empty.")

  def share(part, whole):
    return total[part] / max(total[whole], 1)

  result = {
    "rows": total["rows"],
    "batches": len(labels_per_batch),
    "fill": share("real", "slots"),
    "segments_per_row": share("segments", "rows"),
    "duplicate_rows": share("duplicates", "rows"),
  }
  if "labels" in total:
    masks, kept = share("masks", "labels"), share("kept", "labels")
    result |= {
      "masked_rate": share("labels", "real"),
      "mask_share": masks,
      "random_share": 1 - masks - kept if total["labels"] else 0.0,
      "kept_share": kept,
      "labels_per_batch": float(np.mean(labels_per_batch)),
      "labels_per_batch_min": min(labels_per_batch),
      "labels_per_batch_max": max(labels_per_batch),
    }
  if "pairs" in total:
    result |= {
      "pairs": share("pairs", "rows"),
      "pair_positive": share("positive", "pairs"),
    }
  return result


def _counts(
  batch: Mapping[str, np.ndarray], tokenizer: Any, seen: set[bytes]
) -> collections.Counter[str]:
  """Sums over one batch; what its arrays do not tell has no key.

  Args:
    batch: as `audit` reads them.
    tokenizer: for its `mask_id`.
    seen: digests of the rows before, to which those of the batch are added.
  """
  real = batch["segment_ids"] > 0
  filled = real.any(axis=1)
  counts = collections.Counter(
    rows=int(filled.sum()),
    slots=real.size,
    real=int(real.sum()),
    segments=int(batch["segment_ids"].max(axis=1).sum()),
    duplicates=0,
  )
  for row in original_tokens(batch)[filled]:
    digest = hashlib.blake2b(row.tobytes(), digest_size=12).digest()
    counts["duplicates"] += digest in seen
    seen.add(digest)
  if "labels" in batch:
    used = batch["labels"] >= 0
    shown = np.take_along_axis(batch["tokens"], batch["masked_positions"], 1)
    counts.update(
      labels=int(used.sum()),
      masks=int((used & (shown == tokenizer.mask_id)).sum()),
      kept=int((used & (shown == batch["labels"])).sum()),
    )
  if "pair_labels" in batch:
    counts.update(
      pairs=int((batch["pair_labels"] >= 0).sum()),
      positive=int((batch["pair_labels"] == 1).sum()),
    )
  return counts


def original_tokens(batch: Mapping[str, np.ndarray]) -> np.ndarray:
  """The tokens [b, t] before masking, restored from the labels."""
  tokens = batch["tokens"].copy()
  if "labels" in batch:
    rows, slots = np.nonzero(batch["labels"] >= 0)
    where = batch["masked_positions"][rows, slots]
    tokens[rows, where] = batch["labels"][rows, slots]
  return tokens


def text(statistics: Mapping[str, float]) -> str:
  """One aligned line per statistic."""
  width = max(map(len, statistics))
  return "\n".join(
    f"{name:<{width}}  {value if isinstance(value, int) else f'{value:.4f}'}"
    for name, value in statistics.items()
  )


def show(dataset: Any, tokenizer: Any, index: int) -> str:
  """Row `index` of the global stream as text, a segment per line.

  A masked token reads `shown<original`, e.g. `[MASK]<cat`; where the original
  was kept the two are equal. Padding is left out.
  """
  row = {k: v[0] for k, v in dataset.rows(index, index + 1).items()}
  pieces = list(tokenizer.pieces(row["tokens"]))
  if "labels" in row:
    used = row["labels"] >= 0
    originals = tokenizer.pieces(row["labels"][used])
    for position, original in zip(row["masked_positions"][used], originals):
      pieces[position] += f"<{original}"
  epoch, number = dataset.epoch_of(index)
  lines = [f"row {index}: epoch {epoch}, row {number} of it"]
  if "pair_labels" in row:
    lines[0] += f", pair label {row['pair_labels']}"
  for segment in range(1, int(row["segment_ids"].max(initial=0)) + 1):
    places = np.flatnonzero(row["segment_ids"] == segment)
    lines.append(f"  {segment}: " + " ".join(pieces[i] for i in places))
  return "\n".join(lines)
