"""BERT-base on this machine's CPU, against PyTorch in the same run.

  python -m benchmarks.step [--rounds=8] [--dtype=bfloat16]

A training step (batch 8 x 128, 20 masked positions a row) and a forward pass in
turn, so that both see the same machine; `benchmarks/bert_base.py` says of what.
"""

import argparse
import json

import numpy as np

from benchmarks import bert_base, history, output

_ROWS, _LENGTH, _MASKED = 8, 128, 20


def measure(
  rounds: int,
  threads: int | None = None,
  dtype: str | None = None,
  **options,
) -> dict[str, dict[str, float]]:
  """Training and inference of both.

  Args:
    rounds: timed ones.
    threads: PyTorch's; by default all cores, as XLA.
    dtype: of products on both sides; that which PyTorch is faster in if None.
    **options: as `bert_base.ours`.
  """
  threads = threads or history.cores()
  dtype = dtype or bert_base.fastest_dtype(threads)
  mine = bert_base.ours([_batch()], dtype=dtype, **options)
  other = bert_base.theirs([_padded()], threads, dtype)
  found = {}
  passes = zip(bert_base.PASSES[dtype], mine, other, (rounds, 4 * rounds))
  for name, a, b, times in passes:
    found[name] = bert_base.compare(_ROWS * _LENGTH, a, b, times, threads)
    bert_base.show(name, found[name])
  return found


def _batch() -> bert_base.Batch:
  rng = np.random.default_rng(0)
  shape = (_ROWS, _LENGTH)
  positions = np.tile(np.arange(_LENGTH), (_ROWS, 1))
  masked = np.sort(rng.permuted(positions, axis=1)[:, :_MASKED])
  batch = dict(
    tokens=rng.integers(1000, bert_base.VOCABULARY, shape),
    segment_ids=np.ones(shape),
    positions=positions,
    type_ids=np.zeros(shape),
    masked_positions=masked,
    labels=rng.integers(1000, bert_base.VOCABULARY, masked.shape),
  )
  return {name: x.astype(np.int32) for name, x in batch.items()}


def _padded() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  rng = np.random.default_rng(0)
  tokens = rng.integers(1000, bert_base.VOCABULARY, (_ROWS, _LENGTH))
  labels = np.full_like(tokens, -100)
  labels[:, : _MASKED * 6 : 6] = tokens[:, : _MASKED * 6 : 6]
  return tokens, np.ones_like(tokens), labels


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m benchmarks.step")
  add = parser.add_argument
  add("--rounds", type=int, default=8, help="timed, after one warm-up")
  add("--threads", type=int, help="PyTorch's; default: all cores, as XLA")
  add("--dtype", choices=[*bert_base.PASSES], help="default: PyTorch's faster")
  add("--scan", action="store_true", help="scanned stack")
  add("--prng", default="threefry2x32", help="generator of dropout")
  add("--json", type=output.path, help="file for all figures")
  options = parser.parse_args()
  print(f"BERT-base, {_ROWS} x {_LENGTH} tokens, against PyTorch:")
  found = measure(
    options.rounds,
    options.threads,
    options.dtype,
    scan=options.scan,
    prng=options.prng,
  )
  if options.json:
    options.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
  main()
