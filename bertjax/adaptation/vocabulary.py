"""Rows for the pieces that a vocabulary has beyond that of the model it was.

How a new embedding begins decides how much of the old model survives the first
steps: far from all others it takes probability from every old piece (Hewitt
2021, "Initializing new word embeddings for pretrained language models").
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from bertjax import registry
from bertjax.data.tokenizers import Tokenizer
from bertjax.data.tokenizers.base import unused_slot

# Parameters with a row for every piece.
TABLES = ("encoder/embeddings/token/embedding", "mlm_head/bias")


@dataclasses.dataclass(frozen=True)
class NewRows:
  """Which rows of a table are new, and how the old tokenizer spells them.

  Attributes:
    rows: their ids, ascending.
    spelled: for each the ids of old pieces; empty where there are none.
  """

  rows: Sequence[int]
  spelled: Sequence[np.ndarray]


def new_rows(
  old: Tokenizer, new: Tokenizer, num_old: int, num_new: int
) -> NewRows:
  """The rows that `new` adds to a model of `old`.

  Args:
    old: the tokenizer of the model that is there.
    new: the same with further pieces: appended, or in [unusedN] rows.
    num_old: rows of the old model, which may be more than its pieces.
    num_new: rows of the new one.

  Raises:
    ValueError: a piece that has another id, or nothing new.
  """
  before, after = old.vocabulary, new.vocabulary
  rows, spelled = [], []
  for row in range(num_new):
    piece = after[row] if row < len(after) else None
    was = before[row] if row < len(before) else None
    if was is not None and was != piece and unused_slot(was) is None:
      raise ValueError(
        f"init_from.new_rows: id {row} is {piece!r} in data.tokenizer but"
        f" {was!r} in the model's; old pieces must keep their ids, as with"
        " data.tokenizer.name='extended'."
      )
    if row < num_old and was == piece:
      continue
    rows.append(row)
    spelled.append(_spelling(old, new, piece))
  if not rows:
    raise ValueError(
      "init_from.new_rows: data.tokenizer has no piece that the model lacks;"
      " leave it out."
    )
  return NewRows(rows, spelled)


def _spelling(old: Tokenizer, new: Tokenizer, piece: str | None) -> np.ndarray:
  if piece is None or unused_slot(piece) is not None:
    return np.zeros(0, np.int32)
  if new.kind == "wordpiece":
    text = piece.removeprefix("##")
    if text != piece and (inside := _continuation(old, text)):
      return np.array(inside, np.int32)
  elif piece in new.user_tokens:
    text = piece
  else:
    text = new.decode([new.vocabulary.index(piece)])
  ids = old.encode(text)
  return ids[ids != old.unk_id]


def _continuation(old: Tokenizer, text: str) -> list[int]:
  """Ids of the pieces that spell a text within a word; [] if none do."""
  ids, start = [], 0
  while start < len(text):
    for end in range(len(text), start, -1):
      found = old.piece_id(f"##{text[start:end]}")
      if found is not None:
        break
    else:
      return []
    ids.append(found)
    start = end
  return ids


# How a row begins: old table, ids of its spelling, the row of a fresh model.
Start = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


def mean(table: np.ndarray, spelled: np.ndarray, fresh: np.ndarray):
  """The mean of all old rows: a new piece is as likely as an average one."""
  del spelled, fresh
  return table.mean(0)


def random(table: np.ndarray, spelled: np.ndarray, fresh: np.ndarray):
  """What a model that begins from nothing has there."""
  del table, spelled
  return fresh


def subword_mean(table: np.ndarray, spelled: np.ndarray, fresh: np.ndarray):
  """The mean of the old pieces that spell it; `mean` if none do."""
  return table[spelled].mean(0) if len(spelled) else mean(table, spelled, fresh)


STARTS: dict[str, Start] = {
  "mean": mean,
  "random": random,
  "subword_mean": subword_mean,
}


def extended(
  table: np.ndarray, fresh: np.ndarray, new: NewRows, start: str
) -> np.ndarray:
  """An old table with further rows.

  Args:
    table: of the old model, [rows, ...].
    fresh: of a fresh model with the new vocabulary.
    new: which rows.
    start: key of `STARTS`.
  """
  begin = registry.lookup(STARTS, start, "init_from.new_rows")
  result = np.array(fresh, table.dtype)
  result[: len(table)] = table
  for row, spelled in zip(new.rows, new.spelled, strict=True):
    result[row] = begin(table, spelled, fresh[row])
  return result
