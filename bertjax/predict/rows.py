"""Rows of texts, in padded batches of few shapes."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

from bertjax.data.tokenizers import Tokenizer
from bertjax.loading import LoadedModel

# Rows are padded to multiples of this, so that few shapes are compiled.
LENGTH_STEP = 32


def power_of_two(n: int) -> int:
  """The least power of two that is not below n."""
  return 1 << max(n - 1, 0).bit_length()


def starts(count: int, batch_size: int) -> range:
  """Where batches of `count` rows begin.

  Raises:
    ValueError: `batch_size` is not positive.
  """
  if batch_size < 1:
    raise ValueError(f"batch_size={batch_size} must be at least 1.")
  return range(0, count, batch_size)


def batches(
  rows: Sequence[np.ndarray],
  batch_size: int,
  max_length: int,
  pad_id: int,
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
  """Rows of similar length together: (their indices, padded batch).

  The last batch is filled with empty rows, up to a power of two.
  """
  order = np.argsort([len(r) for r in rows], kind="stable")
  for start in starts(len(rows), batch_size):
    chosen = order[start : start + batch_size]
    longest = len(rows[chosen[-1]])
    length = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, max_length)
    shape = (min(power_of_two(len(chosen)), batch_size), length)
    tokens = np.full(shape, pad_id, np.int32)
    segment_ids = np.zeros(shape, np.int32)
    for i, row in enumerate(chosen):
      tokens[i, : len(rows[row])] = rows[row]
      segment_ids[i, : len(rows[row])] = 1
    yield chosen, {"tokens": tokens, "segment_ids": segment_ids}


def encode_rows(
  model: LoadedModel,
  texts: Sequence[str],
  *,
  max_length: int | None = None,
  truncate: bool = False,
) -> list[np.ndarray]:
  """[CLS] text [SEP] of every text, int32.

  Args:
    model: for its tokenizer and its longest row.
    texts: any strings; they go through the model's own `preprocess` first.
    max_length: longest row, special tokens included; by default the model's.
    truncate: cut longer texts at their end.

  Raises:
    ValueError: no text, or one that is too long.
  """
  if max_length is None:
    max_length = model.max_positions
  if not 3 <= max_length <= model.max_positions:
    raise ValueError(
      f"max_length={max_length} must lie between 3 and the model's"
      f" {model.max_positions} positions."
    )
  return rows_of(
    texts,
    model.need_tokenizer(),
    model.clean,
    max_length,
    truncate=truncate,
  )


def rows_of(
  texts: Sequence[str],
  tokenizer: Tokenizer,
  clean: Callable[[str], str],
  max_length: int,
  *,
  parse_special: bool = False,
  truncate: bool = False,
) -> list[np.ndarray]:
  """[CLS] text [SEP] of every text, int32.

  Args:
    texts: any strings.
    tokenizer: of the model.
    clean: what they go through first; special tokens that are parsed do not.
    max_length: longest row, special tokens included.
    parse_special: whether "[MASK]" in a text is the mask.
    truncate: cut longer texts at their end.

  Raises:
    ValueError: no text, or one that is too long.
  """
  if isinstance(texts, str):
    raise ValueError("texts is one string; pass a list of texts.")
  specials = tokenizer.specials.names() if parse_special else ()
  texts = [_cleaned(text, clean, specials) for text in texts]
  if not texts:
    raise ValueError("There is no text; pass at least one.")
  encoded = tokenizer.encode_batch(texts, parse_special=parse_special)
  rows = []
  for i, ids in enumerate(encoded):
    if len(ids) + 2 > max_length and not truncate:
      raise ValueError(
        f"Text {i} has {len(ids) + 2} tokens with {tokenizer.specials.cls} and"
        f" {tokenizer.specials.sep}; at most {max_length} fit. Shorten it, or"
        " ask for truncation (--truncate)."
      )
    ids = ids[: max_length - 2]
    rows.append(
      np.concatenate([[tokenizer.cls_id], ids, [tokenizer.sep_id]]).astype(
        np.int32
      )
    )
  return rows


def _cleaned(text: str, clean: Callable[[str], str], but: Sequence[str]) -> str:
  """A text gone through a function, but for some names and spaces at them."""
  if not but:
    return clean(text)
  names = "|".join(map(re.escape, but))
  parts = re.split(rf"(\s*(?:{names})\s*)", text)
  parts[::2] = map(clean, parts[::2])
  return "".join(parts)


def array_batches(
  arrays: Mapping[str, np.ndarray], batch_size: int, pad_id: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
  """Rows that are padded already, in batches cut to what they need.

  Args:
    arrays: leading axis of rows, last axis of tokens; `segment_ids` says which
      of these are real.
    batch_size: rows at a time.
    pad_id: what fills the rows of the last batch, up to a power of two.

  Yields:
    Indices of the rows, and their batch.
  """
  real = arrays["segment_ids"] > 0
  lengths = real.sum(-1).reshape(len(real), -1).max(1)
  order = np.argsort(lengths, kind="stable")
  for start in starts(len(order), batch_size):
    chosen = order[start : start + batch_size]
    longest = -(-int(lengths[chosen[-1]]) // LENGTH_STEP) * LENGTH_STEP
    missing = min(power_of_two(len(chosen)), batch_size) - len(chosen)
    batch = {}
    for name, array in arrays.items():
      rows = array[chosen][..., :longest]
      fill = pad_id if name == "tokens" else 0
      batch[name] = np.pad(
        rows,
        [(0, missing)] + [(0, 0)] * (rows.ndim - 1),
        constant_values=fill,
      )
    yield chosen, batch
