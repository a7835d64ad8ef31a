r"""How fast batches come: cache read, assembly, masking, on one core.

Run:  python -m benchmarks.reading [--seq_len=128] [--json=reading.json]

Reads the built-in `python_docs` corpus (its first documents) through a real
token cache, mode by mode, in the caller's thread. Real tokens are counted, not
padding. The first pass over a block reads its documents from disk; that pass is
part of the measurement, as in training.
"""

import argparse
import itertools
import json
import os
import tempfile
import time

import numpy as np

from benchmarks import output
from bertjax.data import (
  cache_build,
  instances,
  masking,
  sources,
  text_dataset,
  tokenizers,
)

_BATCH_SIZE = 64


class FirstDocuments:
  """The first documents of a source, as a source."""

  def __init__(self, source, count):
    self._source, self._count = source, count
    self.name, self.licence = source.name, source.licence
    self.splits = source.splits

  def fingerprint(self):
    return f"{self._source.fingerprint()}-first{self._count}"

  def examples(self, split):
    return itertools.islice(self._source.examples(split), self._count)


def measure(cache, tokenizer, name, unit, seq_len, seconds):
  """Rates of one mode, reading from the start for about `seconds`."""
  data = text_dataset.TextDataset(
    cache,
    tokenizer,
    instances=dict(name=name),
    masking=dict(unit=unit),
    seq_len=seq_len,
  )
  started = time.perf_counter()
  data.batch(0, _BATCH_SIZE)
  first_s = time.perf_counter() - started
  real = step = 0
  started = time.perf_counter()
  while (elapsed := time.perf_counter() - started) < seconds:
    step += 1
    real += np.count_nonzero(data.batch(step, _BATCH_SIZE)["segment_ids"])
  slots = step * _BATCH_SIZE * seq_len
  return {
    "mode": name,
    "unit": unit,
    "tokens_per_s": real / elapsed,
    "slots_per_s": slots / elapsed,
    "fill": real / slots,
    "first_batch_s": first_s,
    "epochs": data.epoch_of(step * _BATCH_SIZE)[0] + 1,
  }


def main():
  parser = argparse.ArgumentParser(description=__doc__)
  parser.add_argument("--seq_len", type=int, default=128)
  parser.add_argument("--documents", type=int, default=4000)
  parser.add_argument("--seconds", type=float, default=1.0)
  parser.add_argument(
    "--json", type=output.path, help="also write the rates to this file"
  )
  args = parser.parse_args()
  if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

  source = FirstDocuments(sources.SOURCES["python_docs"](), args.documents)
  texts = [e["text"] for e in source.examples("train")]
  tokenizer = tokenizers.train_tokenizer(
    "wordpiece", texts, vocab_size=4096, max_bytes=2**20
  )
  rows = []
  with tempfile.TemporaryDirectory() as folder:
    cache = cache_build.build_cache(
      source, "train", tokenizer, "sentences", folder
    )
    print(f"{cache.num_documents} documents, {cache.num_tokens} tokens")
    arms = [(name, "token") for name in instances.INSTANCES]
    arms += [("packed", unit) for unit in masking.UNITS if unit != "token"]
    print("mode            unit        Mtokens/s   fill  first batch s  epochs")
    for name, unit in arms:
      row = measure(cache, tokenizer, name, unit, args.seq_len, args.seconds)
      rows.append(row)
      print(
        f"{name:15} {unit:11} {row['tokens_per_s'] / 1e6:9.2f}"
        f" {row['fill']:6.3f} {row['first_batch_s']:14.3f}"
        f" {row['epochs']:7d}"
      )
  if args.json:
    named = {f"{row['mode']} {row['unit']}": row for row in rows}
    args.json.write_text(json.dumps(named, indent=2))


if __name__ == "__main__":
  main()
