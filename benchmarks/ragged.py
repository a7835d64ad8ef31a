"""BERT-base on text as long as it is: packed rows against padded ones.

  python -m benchmarks.ragged [--rounds=3]

Documents of the installed Python packages that have 20 to 512 pieces. PyTorch
gets them as its users feed it, in batches of 8 padded to the longest, in their
order and sorted by length; ours packs them into rows of 512, each document
attending to itself alone. Only real tokens count.
"""

import argparse
import itertools
import json
from collections.abc import Sequence

import numpy as np

from benchmarks import bert_base, history, output
from bertjax.data import sources, tokenizers

LENGTH, SHORTEST, ROWS = 512, 20, 8
_SHARE = 0.15  # of tokens that are masked
_DOCUMENTS = 24


def documents(count: int) -> list[np.ndarray]:
  """Token ids of documents, each 20 to 512 long, drawn from the first ones."""
  texts = []
  for example in sources.SOURCES["python_docs"]().examples("train"):
    texts.append(example["text"])
    if len(texts) == 40 * count:
      break
  tokenizer = tokenizers.train_tokenizer(
    "wordpiece", texts[: 4 * count], vocab_size=4096, max_bytes=2**20
  )
  pick = np.random.default_rng(0).permutation(len(texts))
  ids = (np.asarray(tokenizer.encode(texts[i])) for i in pick)
  found = (x for x in ids if SHORTEST <= len(x) <= LENGTH)
  return list(itertools.islice(found, count))


def packed(texts: Sequence[np.ndarray], length: int) -> bert_base.Batch:
  """Rows of `length` that hold whole documents, the longest placed first.

  Every 1 / 0.15th token of a document is masked.
  """
  rows: list[list[np.ndarray]] = []
  for text in sorted(texts, key=len, reverse=True):
    free = (r for r in rows if sum(map(len, r)) + len(text) <= length)
    row = next(free, None)
    if row is None:
      rows.append(row := [])
    row.append(text)
  count = int(length * _SHARE)
  shape = (len(rows), length)
  batch = {
    name: np.zeros(shape, np.int32)
    for name in ("tokens", "segment_ids", "positions", "type_ids")
  }
  masked = np.zeros((len(rows), count), np.int32)
  labels = np.zeros_like(masked)
  for row, parts in enumerate(rows):
    start, chosen = 0, []
    for number, text in enumerate(parts, 1):
      here = slice(start, start + len(text))
      batch["tokens"][row, here] = text
      batch["segment_ids"][row, here] = number
      batch["positions"][row, here] = np.arange(len(text))
      chosen += list(range(start, start + len(text)))[:: round(1 / _SHARE)]
      start += len(text)
    chosen = chosen[:count]
    masked[row, : len(chosen)] = chosen
    labels[row, : len(chosen)] = batch["tokens"][row, chosen]
  return batch | {"masked_positions": masked, "labels": labels}


def split(batch: bert_base.Batch, parts: int) -> list[bert_base.Batch]:
  """As many batches of equally many rows; the last rows may be empty."""
  rows = -(-len(batch["tokens"]) // parts)

  def part(x, number):
    found = np.zeros((rows, x.shape[1]), x.dtype)
    taken = x[number * rows : (number + 1) * rows]
    found[: len(taken)] = taken
    return found

  return [{k: part(x, i) for k, x in batch.items()} for i in range(parts)]


def padded(
  texts: Sequence[np.ndarray], rows: int
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
  """Batches of (tokens, mask, labels), padded to the longest of each."""
  batches = []
  for first in range(0, len(texts), rows):
    part = texts[first : first + rows]
    shape = (len(part), max(map(len, part)))
    tokens, mask = np.zeros(shape, np.int64), np.zeros(shape, np.int64)
    labels = np.full(shape, -100)
    for row, text in enumerate(part):
      tokens[row, : len(text)] = text
      mask[row, : len(text)] = 1
      labels[row, : len(text) : round(1 / _SHARE)] = text[:: round(1 / _SHARE)]
    batches.append((tokens, mask, labels))
  return batches


def measure(rounds: int) -> dict[str, dict[str, float]]:
  """Training and inference of both, PyTorch's batches in order and sorted."""
  texts = documents(_DOCUMENTS)
  real = sum(map(len, texts))
  whole = packed(texts, LENGTH)
  threads = history.cores()
  dtype = bert_base.fastest_dtype(threads)
  mine = bert_base.ours(split(whole, len(texts) // ROWS), dtype=dtype)
  fill = real / whole["tokens"].size
  print(f"{len(texts)} documents, {real} tokens; packed rows {fill:.0%} full")
  found = {}
  for order, arranged in (("", texts), (" sorted", sorted(texts, key=len))):
    batches = padded(arranged, ROWS)
    other = bert_base.theirs(batches, threads, dtype)
    for name, a, b in zip(bert_base.PASSES[dtype], mine, other):
      found[name + order] = bert_base.compare(real, a, b, rounds, threads)
      bert_base.show(name + order, found[name + order])
  return found


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.ragged")
  parser.add_argument(
    "--rounds", type=int, default=3, help="timed, after one warm-up"
  )
  parser.add_argument("--json", type=output.path, help="file for all figures")
  options = parser.parse_args()
  found = measure(options.rounds)
  if options.json:
    options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
  main()
