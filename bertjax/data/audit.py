"""Is the data what the config says? Statistics of batches, and a look at rows.

A run that learns nothing often reads something odd: everything masked, all
padding, one label, the same rows again. `audit` counts what went by.
"""

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
  total = dict.fromkeys(
      ("rows", "slots", "real", "segments", "duplicates", "labels", "masks",
       "kept", "pairs", "positive"), 0
  )  # fmt: skip
  labels_per_batch, seen = [], set()
  has_labels = has_pairs = False
  for batch in batches:
    real = batch["segment_ids"] > 0
    total["rows"] += int(real.any(axis=1).sum())
    total["slots"] += real.size
    total["real"] += int(real.sum())
    total["segments"] += int(batch["segment_ids"].max(axis=1).sum())
    for row in original_tokens(batch)[real.any(axis=1)]:
      digest = hashlib.blake2b(row.tobytes(), digest_size=12).digest()
      total["duplicates"] += digest in seen
      seen.add(digest)
    if "labels" in batch:
      has_labels = True
      used = batch["labels"] >= 0
      shown = np.take_along_axis(batch["tokens"], batch["masked_positions"], 1)
      total["labels"] += int(used.sum())
      total["masks"] += int((used & (shown == tokenizer.mask_id)).sum())
      total["kept"] += int((used & (shown == batch["labels"])).sum())
    if "pair_labels" in batch:
      has_pairs = True
      total["pairs"] += int((batch["pair_labels"] >= 0).sum())
      total["positive"] += int((batch["pair_labels"] == 1).sum())
    labels_per_batch.append(
      int((batch["labels"] >= 0).sum()) if "labels" in batch else 0
    )
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
  if has_labels:
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
  if has_pairs:
    result |= {
      "pairs": share("pairs", "rows"),
      "pair_positive": share("positive", "pairs"),
    }
  return result


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
