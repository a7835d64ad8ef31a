r"""Every attention kernel compiled for every TPU, at BERT's shapes.

  python -m kernels.battery [--output FILE.csv] [--chip v5e]

Compiles forward and backward for a covering set of (chip, heads, width, length,
segment ids, dropout, bias, relative terms, window): every pair of choices
stands in some row. Prints and writes, by row, the tiles with their reason and
the VMEM they take. A kernel that does not fit fails the compilation.
"""

import argparse
import itertools
import pathlib
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bertjax.hardware import hlo, topologies, traffic
from experiments import tables
from kernels.bench import CHIPS
from kernels.flash_attention import programs
from kernels.flash_attention.options import Extras, Options
from kernels.flash_attention.relative import Relative
from kernels.flash_attention.tpu import tiles
from kernels.flash_attention.tpu.problem import describe
from kernels.flash_attention.tpu.reasons import reason

CHOICES: Mapping[str, Sequence[Any]] = {
  "chip": tuple(CHIPS),
  "length": (64, 128, 256, 512, 1024, 2048, 4096, 8192),
  "heads": (2, 4, 8, 12, 16),
  "width": (32, 64, 128),
  "bias": (None, "key", "full"),
  "relative": (None, "bias", "products"),
  "dropout": (None, "counter", "hardware"),
  "window": (None, "causal", (64, 64)),
  "segment_ids": (False, True),
}
# A bias of every query and key is itself quadratic.
LONGEST_FULL_BIAS = 2048
# What any other choice is allowed with.
SMALL = {"length": 0, "width": 32, "bias": None, "relative": None}
_TRIES = 50
Row = dict[str, Any]


def allowed(row: Row) -> bool:
  """Whether anybody would ask for it."""
  long = row["length"] > LONGEST_FULL_BIAS
  entries = 2 * 2 * row["length"] * row["width"]  # of keys and of queries
  large = 8 * entries > tiles.RELATIVE_BYTES
  return not (
    (row["bias"] == "full" and long)
    or (row["relative"] == "products" and large)
  )


def covering(choices: Mapping[str, Sequence[Any]], seed: int = 0) -> list[Row]:
  """Rows in which every allowed pair of choices occurs, few of them."""
  draw = random.Random(seed)
  missing = {
    pair
    for a, b in itertools.combinations(choices, 2)
    for pair in itertools.product(
      ((a, x) for x in choices[a]), ((b, y) for y in choices[b])
    )
    if allowed(SMALL | dict(pair))
  }
  rows = []
  while missing:
    first = min(missing, key=repr)
    tried = []
    for _ in range(_TRIES):
      row = {name: draw.choice(values) for name, values in choices.items()}
      row |= dict(first)
      if allowed(row):
        pairs = set(itertools.combinations(row.items(), 2)) & missing
        tried.append((len(pairs), len(tried), row, pairs))
    _, _, row, pairs = max(tried)
    rows.append(row)
    missing -= pairs
  return rows


def options_of(row: Row) -> dict[str, Any]:
  """The options of `programs.lower`."""
  found = {}
  if row["bias"]:
    found["bias"] = row["bias"]
  if row["relative"] == "bias":
    found["relative_bias"] = True
  elif row["relative"]:
    found |= {"relative_keys": True, "relative_queries": True}
  if row["dropout"]:
    found |= {
      "dropout_rate": 0.1,
      "dropout_seed": 0,
      "dropout_generator": row["dropout"],
    }
  if row["window"] == "causal":
    found["causal"] = True
  elif row["window"]:
    found["window"] = row["window"]
  if row["segment_ids"]:
    found["segment_ids"] = True
  return found


def _relative(row: Row) -> Relative | None:
  """Shapes of the terms of relative positions."""
  h, n, d = row["heads"], 2 * row["length"] - 1, row["width"]
  if row["relative"] is None:
    return None
  if row["relative"] == "bias":
    return Relative(bias=jax.ShapeDtypeStruct((1, h, n), jnp.float32))
  entries = jax.ShapeDtypeStruct((1, h, d, n), jnp.bfloat16)
  return Relative(keys=entries, queries=entries)


def tiles_of(row: Row) -> Iterator[tuple[str, tiles.Tiles, str]]:
  """(pass, tiles, reason) of the forward and the backward kernel."""
  h, t, d = row["heads"], row["length"], row["width"]
  x = jax.ShapeDtypeStruct((1, h, d, t), jnp.bfloat16)
  ids = jax.ShapeDtypeStruct((1, t), jnp.int32) if row["segment_ids"] else None
  bias = {None: None, "key": (1, h, 1, t), "full": (1, h, t, t)}[row["bias"]]
  if bias is not None:
    bias = jax.ShapeDtypeStruct(bias, jnp.float32)
  extras = Extras(
    bias=bias, q_segments=ids, kv_segments=ids, relative=_relative(row)
  )
  options = Options(
    scale=d**-0.5,
    layout="bhdt",
    causal=row["window"] == "causal",
    window=row["window"] if isinstance(row["window"], tuple) else None,
    dropout_rate=0.1 if row["dropout"] else 0.0,
  )
  problem = describe(x, x, x, extras, options)
  for name, by_column in (("forward", False), ("backward", True)):
    chosen = tiles.choose(problem, by_column)
    yield name, chosen, reason(problem, chosen)


def compiled(row: Row) -> Row:
  """The row with its tiles, their reasons, and the VMEM of its kernels.

  Raises:
    Exception: the compiler's, if a kernel does not fit.
  """
  devices = topologies.devices(topologies.parse(CHIPS[row["chip"]]))
  lowered = programs.lower(
    devices,
    sizes=(1, row["heads"], row["length"], row["width"]),
    options=options_of(row),
  )
  module = hlo.Module(lowered.compile().as_text())
  used = [
    traffic.vmem_bytes(executed.instruction)
    for executed in module.executed()
    if "flash_attention_tpu" in executed.instruction.name
  ]
  found = dict(row)
  for name, chosen, why in tiles_of(row):
    found[f"{name} tiles"] = (
      f"{chosen.heads} heads x {chosen.t} queries x {chosen.s} keys"
    )
    found[f"{name} reason"] = why
  return found | {"kernels": len(used), "vmem_bytes": max(used)}


def main(arguments: Sequence[str] | None = None) -> None:
  """Command line."""
  parser = argparse.ArgumentParser(prog="python -m kernels.battery")
  parser.add_argument("--chip", choices=CHIPS, help="only this one")
  parser.add_argument(
    "--output", type=pathlib.Path, help="CSV file; by default none"
  )
  given = parser.parse_args(arguments)
  rows = []
  for row in covering(CHOICES):
    if given.chip in (None, row["chip"]):
      rows.append(compiled(row))
      print({k: v for k, v in rows[-1].items() if v}, flush=True)
  if given.output is not None:
    tables.write_csv(given.output, rows)
  most = max(rows, key=lambda row: row["vmem_bytes"])
  print(
    f"{len(rows)} programs compile. The most VMEM:"
    f" {most['vmem_bytes'] / 2**20:.1f} MiB, of {most}"
  )


if __name__ == "__main__":
  main()
