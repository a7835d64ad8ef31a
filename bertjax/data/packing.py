"""Bin packing of lengths into rows.

Best-fit decreasing over the histogram of lengths, after Krell et al. 2021
(arXiv:2107.02027): all pieces of one length are placed together, so the work
grows with the number of distinct lengths, not of documents.
"""

import numpy as np
from jaxtyping import Int


def best_fit_decreasing(
  lengths: Int[np.ndarray, "n"], capacity: int
) -> Int[np.ndarray, "n"]:
  """Assigns every piece to a row so that no row overflows.

  Longest pieces first; each goes to the fullest row that still has room, or
  opens a row. Pieces of equal length are placed in the order given.

  Args:
    lengths: positive size of each piece.
    capacity: size of a row.

  Returns:
    The row of each piece; rows are numbered from 0 without gaps.

  Raises:
    ValueError: a piece is longer than a row, or not positive.
  """
  lengths = np.asarray(lengths, np.int64)
  row = np.empty(len(lengths), np.int64)
  if not len(lengths):
    return row
  if lengths.max() > capacity or lengths.min() < 1:
    raise ValueError(
      f"lengths lie in {lengths.min()}..{lengths.max()}, but a piece must"
      f" have 1..{capacity} tokens; cut longer ones first."
    )
  order = np.argsort(-lengths, kind="stable")
  sizes, firsts, counts = np.unique(
    -lengths[order], return_index=True, return_counts=True
  )
  # open_rows[r]: stacks of rows that have room for r more tokens.
  open_rows = [[] for _ in range(capacity + 1)]
  num_rows = 0
  for size, first, count in zip((-sizes).tolist(), firsts, counts):
    pieces = order[first : first + count]
    while len(pieces):
      room = next((r for r in range(size, capacity + 1) if open_rows[r]), None)
      if room is None:
        # New rows take as many pieces of this size as they hold.
        full, rest = divmod(len(pieces), capacity // size)
        row[pieces] = num_rows + np.arange(len(pieces)) // (capacity // size)
        if full:
          rows = np.arange(num_rows, num_rows + full)
          open_rows[capacity % size].append(rows)
        if rest:
          rows = np.array([num_rows + full])
          open_rows[capacity - rest * size].append(rows)
        num_rows += full + bool(rest)
        break
      rows = open_rows[room].pop()
      if len(rows) > len(pieces):
        open_rows[room].append(rows[len(pieces) :])
        rows = rows[: len(pieces)]
      row[pieces[: len(rows)]] = rows
      pieces = pieces[len(rows) :]
      open_rows[room - size].append(rows)
  return row
