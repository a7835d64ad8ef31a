"""Headlines of the benchmarks by commit: a line of JSON for each run."""

import json
import os
import pathlib
import platform
from collections.abc import Mapping, Sequence
from typing import Any

PATH = pathlib.Path(__file__).parent / "history.jsonl"
# Of what a part measured, what is worth comparing between commits, and what it
# is called. Absolute speeds are those of the machine of that line.
HEADLINES = {
  "reading": {"packed token/tokens_per_s": "tokens/s read"},
  "step": {
    "train/ratio": "training, of PyTorch",
    "infer_bf16/ratio": "inference, of PyTorch",
    "train_f32/ratio": "training in float32, of PyTorch",
    "infer_f32/ratio": "inference in float32, of PyTorch",
  },
  "ragged": {
    "train/ratio": "ragged training, of PyTorch",
    "infer_bf16/ratio": "ragged inference, of PyTorch",
    "train sorted/ratio": "ragged training, of PyTorch sorted",
    "infer_bf16 sorted/ratio": "ragged inference, of PyTorch sorted",
    "train_f32/ratio": "ragged training in float32, of PyTorch",
    "infer_f32/ratio": "ragged inference in float32, of PyTorch",
    "train_f32 sorted/ratio": "ragged training in float32, of PyTorch sorted",
    "infer_f32 sorted/ratio": "ragged inference in float32, of PyTorch sorted",
  },
  "compiling": {
    "first_s": "BERT-large compiled, s",
    "second_s": "from the cache, s",
  },
  "points": {
    "group ratio": "grouping, of PyTorch",
    "chamfer ratio": "Chamfer, of PyTorch",
  },
  "tpu": {
    "tokens_per_s_per_chip": "v5e tokens/s, planned",
    "mfu": "v5e MFU, planned",
  },
  "farthest_points": {"pre-training/kernel": "v5e farthest points, cycles"},
}
# What was measured before PyTorch had weights in bfloat16.
_FORMER = {
  ("step", "infer/ratio"): "inference, of autocast",
  ("ragged", "infer/ratio"): "ragged inference, of autocast",
  ("ragged", "infer sorted/ratio"): "ragged inference, of autocast sorted",
}
_FIELDS = ("commit", "date", "cores", "found")


def headlines(part: str, measured: Mapping[str, Any]) -> dict[str, float]:
  """The numbers of a part that go into its line.

  Raises:
    ValueError: it measured none of `HEADLINES`.
  """
  found = {}
  for path in HEADLINES[part]:
    first, *rest = path.split("/")
    if first not in measured:  # what this machine has no use for
      continue
    value: Any = measured[first]
    for name in rest:
      value = value[name]
    found[path] = value
  if not found:
    raise ValueError(
      f"benchmarks.{part} wrote {sorted(measured)}, none of its headlines"
      f" {sorted(HEADLINES[part])}."
    )
  return found


def append(
  path: pathlib.Path,
  found: Mapping[str, Mapping[str, float]],
  commit: str,
  date: str,
) -> None:
  """Adds a line.

  Args:
    path: of the file, made if needed.
    found: headlines by part.
    commit: that was measured.
    date: of the measurement.
  """
  line = dict(
    commit=commit,
    date=date,
    cores=cores(),
    processor=processor(),
    found=found,
  )
  with path.open("a", encoding="utf-8") as file:
    file.write(json.dumps(line) + "\n")


def cores() -> int:
  """Of this process: so many threads has XLA, and PyTorch is to have."""
  if hasattr(os, "sched_getaffinity"):
    return len(os.sched_getaffinity(0))
  return os.cpu_count() or 1


def processor(cpuinfo: pathlib.Path = pathlib.Path("/proc/cpuinfo")) -> str:
  """What the CPU is called; its architecture, where nothing tells."""
  if cpuinfo.exists():
    for line in cpuinfo.read_text(errors="replace").splitlines():
      field, _, value = line.partition(":")
      if field.strip() == "model name":
        return value.strip()
  return platform.processor() or platform.machine()


def read(path: pathlib.Path = PATH) -> list[dict[str, Any]]:
  """All lines, the oldest first; [] if there is no file.

  Raises:
    ValueError: a line that no benchmark wrote.
  """
  if not path.exists():
    return []
  lines = []
  for number, text in enumerate(path.read_text().splitlines(), 1):
    try:
      line = json.loads(text)
      fields = {name: line[name] for name in _FIELDS}
      lines.append(fields | {"processor": line.get("processor", "")})
    except (KeyError, TypeError, ValueError) as err:
      raise ValueError(
        f"{path}, line {number} is not what `make bench` writes ({err!r})."
      ) from err
  return lines


def table(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
  """A row a run; a column a headline, in the order of `HEADLINES`."""
  names = {
    (part, path): label
    for part, paths in HEADLINES.items()
    for path, label in paths.items()
  } | _FORMER
  measured = {
    (part, path)
    for line in lines
    for part, found in line["found"].items()
    for path in found
  }
  order = [key for key in names if key in measured]
  order += sorted(measured - set(order))  # of parts that are no more
  rows = []
  for line in lines:
    cores = f"{line['cores']}"
    if line.get("processor"):
      cores += f" x {line['processor']}"
    row = {"commit": line["commit"], "date": line["date"], "cores": cores}
    for part, path in order:
      value = line["found"].get(part, {}).get(path)
      label = names.get((part, path), f"{part} {path}")
      row[label] = "" if value is None else _number(value)
    rows.append(row)
  return rows


def _number(value: float) -> str:
  return f"{value:,.0f}" if abs(value) >= 1_000 else f"{value:.3g}"
