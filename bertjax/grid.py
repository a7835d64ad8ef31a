"""A config with alternatives: every combination runs, the best is named.

    config.grid = dict(optim=dict(learning_rate=[5e-5, 3e-5]), seed=[0, 1, 2])
    config.keep = dict(best_metric="dev/accuracy")

`config.grid` mirrors the config; where a value stands there, it holds a list of
values. A combination is an ordinary run in a sub-folder, resumable by itself.
The workdir gets grid.csv and `best`, a link to the best run's folder.
"""

import csv
import dataclasses
import hashlib
import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bertjax import fields
from bertjax.checkpoint import BEST, link
from bertjax.config import merge, plain
from bertjax.stopping import score, sign_of

CSV = "grid.csv"
_LONGEST = 255  # bytes of a folder's name


@dataclasses.dataclass(frozen=True)
class Point:
  """One combination.

  Attributes:
    name: of its folder, such as "learning_rate=3e-05,seed=1".
    values: by the path of the field.
    config: the whole config, without a grid.
  """

  name: str
  values: Mapping[str, Any]
  config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Selection:
  """How the best run is found.

  Attributes:
    metric: of `Result.metrics`.
    mode: whether more ("max") or less ("min") is better.
  """

  metric: str
  mode: str


def points(config: Any) -> list[Point]:
  """All combinations of a config's grid; [] without one.

  Raises:
    ValueError: something that is no list of alternatives.
  """
  base = plain(config)
  grid = base.pop("grid", None)
  fields.check({"grid": grid})
  axes = dict(_axes(grid or {}))
  if not axes:
    return []
  labels = _labels(list(axes))
  found = []
  for values in itertools.product(*axes.values()):
    chosen = dict(zip(axes, values, strict=True))
    changed = base
    for path, value in chosen.items():
      changed = merge(changed, _nested(path, value))
    name = ",".join(f"{labels[p]}={_short(v)}" for p, v in chosen.items())
    found.append(Point(_folder(name), chosen, changed))
  names = [point.name for point in found]
  if twice := [name for name in names if names.count(name) > 1]:
    raise ValueError(
      f"grid: two combinations are called {twice[0]!r}; remove one."
    )
  return found


def selection(config: Any) -> Selection:
  """What `keep.best_metric` and `keep.best_mode` say of a grid.

  Raises:
    ValueError: no metric.
  """
  keep = plain(config).get("keep", {})
  fields.check({"keep": keep})
  if not keep.get("best_metric"):
    raise ValueError(
      "grid: keep.best_metric is required; it says which run is the best, such"
      " as 'dev/accuracy'."
    )
  mode = keep.get("best_mode", "max")
  sign_of(mode, "keep.best_mode")
  return Selection(keep["best_metric"], mode)


def best_of(
  results: Sequence[tuple[Point, Mapping[str, float]]], by: Selection
) -> Point:
  """The point whose metric is best, the first of equals.

  Raises:
    ValueError: a run did not report the metric.
  """
  sign = sign_of(by.mode, "keep.best_mode")
  scores = []
  for point, metrics in results:
    if by.metric not in metrics:
      raise ValueError(
        f"keep.best_metric={by.metric!r} is not reported by {point.name};"
        f" choose from {', '.join(sorted(metrics))}."
      )
    scores.append(score(metrics[by.metric], sign))
  return results[scores.index(max(scores))][0]


def record(
  workdir: pathlib.Path,
  results: Sequence[tuple[Point, Mapping[str, float]]],
  best: Point,
) -> pathlib.Path:
  """Writes grid.csv, a row a run, and the link `best`; returns the table."""
  columns = dict.fromkeys(name for _, m in results for name in m)
  partial = workdir / f"{CSV}.partial"
  with partial.open("w", newline="") as file:
    writer = csv.writer(file)
    writer.writerow([*results[0][0].values, "best", *columns])
    for point, metrics in results:
      cells = [metrics.get(name, "") for name in columns]
      writer.writerow([*point.values.values(), int(point == best), *cells])
  table = partial.replace(workdir / CSV)
  link(workdir / BEST, best.name)
  return table


def _axes(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
  for key, value in tree.items():
    name = f"{path}.{key}" if path else key
    if isinstance(value, Mapping):
      yield from _axes(value, name)
    elif isinstance(value, (list, tuple)) and value:
      yield name, list(value)
    else:
      raise ValueError(
        f"grid.{name}={value!r} must be a list of the values to try."
      )


def _nested(path: str, value: Any) -> dict[str, Any]:
  for key in reversed(path.split(".")):
    value = {key: value}
  return value


def _labels(paths: Sequence[str]) -> dict[str, str]:
  """The last part of each path; the whole where that is not enough."""
  lasts = [path.rpartition(".")[2] for path in paths]
  return {
    path: last if lasts.count(last) == 1 else path
    for path, last in zip(paths, lasts)
  }


def _folder(name: str) -> str:
  """The name, or as much as a file system takes and a hash of the whole."""
  encoded = name.encode()
  if len(encoded) <= _LONGEST:
    return name
  end = f"-{hashlib.sha256(encoded).hexdigest()[:8]}"
  return encoded[: _LONGEST - len(end)].decode(errors="ignore") + end


def _short(value: Any) -> str:
  text = value if isinstance(value, str) else json.dumps(value, default=str)
  return re.sub(r"[^\w.+-]+", "_", text)
