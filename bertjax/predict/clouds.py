"""Clouds of points: read from files, drawn as a model's data draw them."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from bertjax.data.shapes import meshes
from bertjax.data.shapes.dataset import Reading
from bertjax.data.shapes.files import check_finite
from bertjax.data.shapes.procedural import frame
from bertjax.loading import LoadedModel
from bertjax.points import farthest_point_sampling
from bertjax.predict.rows import power_of_two, starts

WRITTEN = (".npy", ".ply")  # endings of files that `write_cloud` writes
_TABLES = (".txt", ".xyz", ".csv", ".pts")
_DENSE = 10_000  # points of ModelNet40's clouds, of which the farthest are kept
# What models were trained on that do not say it themselves.
_PUBLISHED: dict[str, dict[str, Any]] = {
  "point_classification": dict(
    stored_points=1200,
    farthest=True,
    draw_eval="first",
    augment=({"name": "scale_shift"},),
  ),
  "part_segmentation": dict(num_points=2048, draw="replacement"),
}


def read_cloud(path: str | pathlib.Path, num_points: int) -> np.ndarray:
  """The points of a file, float64 [n, 3]: a scan may be far from the origin.

  Args:
    path: an array [n, 3 or more] (.npy), a table of x y z in text, separated
      by spaces or commas, or a mesh, whose surface is sampled; of a file of
      vertices without faces these are the points.
    num_points: sampled from a mesh.

  Raises:
    ValueError: no such file, another kind of file, or one without points.
  """
  path = pathlib.Path(path)
  ending = path.suffix.lower()
  if not path.is_file():
    raise ValueError(f"{path} is not a file.")
  if ending in meshes.ENDINGS:
    rows = meshes.sampled(path, num_points, or_vertices=True)
  else:
    rows = _table(path)
  if rows.ndim != 2 or rows.shape[1] < 3 or not len(rows):
    raise ValueError(
      f"{path} holds an array of shape {rows.shape}; it should be [points, 3]."
    )
  check_finite(path, rows[:, :3])
  if not np.ptp(rows[:, :3], axis=0).any():
    raise ValueError(f"{path}: its {len(rows)} points all lie in one place.")
  return rows[:, :3]


def _table(path: pathlib.Path) -> np.ndarray:
  """The numbers of a file that is no mesh, float64."""
  try:
    if path.suffix.lower() == ".npy":
      rows = np.load(path)
    elif path.suffix.lower() in _TABLES:
      text = path.read_text(encoding="utf-8").replace(",", " ")
      rows = np.loadtxt(text.splitlines(), ndmin=2)
    else:
      raise ValueError(
        f"the ending must be one of .npy, {', '.join(_TABLES)} (points) or"
        f" {', '.join(meshes.ENDINGS)} (meshes)"
      )
    return np.asarray(rows, np.float64)
  except (ValueError, EOFError) as err:
    raise ValueError(f"{path} holds no points: {err}.") from err


def write_cloud(
  path: str | pathlib.Path,
  points: np.ndarray,
  parts: np.ndarray | None = None,
) -> None:
  """Writes points as an array (.npy) or for viewers (.ply), with every digit.

  Args:
    path: of the file.
    points: [n, 3].
    parts: of each point, int [n]; a fourth column, or a property of vertices.

  Raises:
    ValueError: another ending.
  """
  path, points = pathlib.Path(path), np.asarray(points, np.float64)
  ending = path.suffix.lower()
  if ending == ".npy":
    columns = [points] if parts is None else [points, parts[:, None]]
    with path.open("wb") as file:  # by its path, .NPY would get a second ending
      np.save(file, np.concatenate(columns, axis=1))
  elif ending == ".ply":
    head = ["ply", "format ascii 1.0", f"element vertex {len(points)}"]
    head += [f"property double {axis}" for axis in "xyz"]
    lines = [" ".join(map(str, row)) for row in points]
    if parts is not None:
      head.append("property int part")
      lines = [f"{line} {part}" for line, part in zip(lines, parts)]
    text = "\n".join([*head, "end_header", *lines])
    path.write_text(text + "\n", encoding="ascii")
  else:
    raise ValueError(f"{path} must end in {' or '.join(WRITTEN)}.")


def _data(model: LoadedModel) -> Mapping[str, Any]:
  """What the model was trained on, or is taken to have been."""
  if model.config and "data" in model.config:
    return model.config["data"]
  return _PUBLISHED.get(model.objective_spec["name"], {})


def reading_of(model: LoadedModel) -> Reading:
  """How rows of training were made of clouds."""
  fields = [field.name for field in dataclasses.fields(Reading)]
  options = {k: v for k, v in _data(model).items() if k in fields}
  options = {"num_points": 1024} | options
  if options.get("draw_eval") is None:
    options["draw_eval"] = options.get("draw", "subset")
  return Reading(**options)


def points_to_sample(model: LoadedModel) -> int:
  """Points of a mesh's surface: as many as clouds of training had."""
  data = _data(model)
  if points := data.get("source", {}).get("points"):
    return points
  dense = _DENSE if data.get("farthest") else 0
  return max(
    reading_of(model).num_points, data.get("stored_points") or 0, dense
  )


class Drawn(NamedTuple):
  """A row made of a cloud.

  Attributes:
    row: what the model reads, float32 [n, 3].
    source: the same points where they are in the cloud.
  """

  row: np.ndarray
  source: np.ndarray


def still(model: LoadedModel, cloud: np.ndarray) -> Drawn:
  """The points that an evaluation would draw, always the same."""
  (found,) = _rows(model, reading_of(model).still(), cloud, 1)
  return found


def views(model: LoadedModel, cloud: np.ndarray, count: int) -> list[Drawn]:
  """Rows drawn and augmented as for training, the same ones every time."""
  return _rows(model, reading_of(model), cloud, count)


def _rows(
  model: LoadedModel, reading: Reading, cloud: np.ndarray, count: int
) -> list[Drawn]:
  data, rng = _data(model), np.random.default_rng(0)
  if data.get("farthest"):
    kept = min(data["stored_points"], len(cloud))
    # It reads float32, which would move points that are far from the origin.
    centred = (cloud - frame(cloud)[0])[None]
    cloud = cloud[np.asarray(farthest_point_sampling(centred, kept))[0]]
  drawn = []
  for _ in range(count):
    row, chosen = reading.drawn(cloud, rng)
    drawn.append(Drawn(row.astype(np.float32), cloud[chosen]))
  return drawn


def check_clouds(
  model: LoadedModel,
  clouds: Sequence[np.ndarray],
  objective: str,
  task: str,
) -> None:
  """Refuses another kind of model, nothing to read, and clouds too small.

  Raises:
    ValueError: says which.
  """
  if (found := model.objective_spec["name"]) != objective:
    raise ValueError(
      f"{model.path} was made for {found!r}; {task} needs {objective!r}."
    )
  if not len(clouds):
    raise ValueError("There is no cloud; pass at least one (--input).")
  least = model.objective.least_points
  for number, cloud in enumerate(clouds):
    if len(cloud) < least:
      raise ValueError(
        f"Cloud {number} has {len(cloud)} points, too few for"
        f" {model.path}, which takes {least}."
      )


def run(
  model: LoadedModel,
  method: Callable[..., Any] | str,
  arrays: Mapping[str, np.ndarray],
  batch_size: int,
) -> Any:
  """What a method of the objective says of rows, in batches of few shapes.

  Args:
    model: whose objective it is.
    method: of the objective; takes a batch.
    arrays: leading axis of rows.
    batch_size: rows at a time.
  """
  count, found = len(next(iter(arrays.values()))), []
  for start in starts(count, batch_size):
    part = {k: x[start : start + batch_size] for k, x in arrays.items()}
    rows = len(next(iter(part.values())))
    missing = min(power_of_two(rows), batch_size) - rows
    batch = {
      k: np.concatenate([x, np.repeat(x[:1], missing, axis=0)])
      for k, x in part.items()
    }
    said = jax.device_get(
      _apply(model.variables, batch, objective=model.objective, method=method)
    )
    found.append(jax.tree.map(lambda x, rows=rows: x[:rows], said))
  return jax.tree.map(lambda *parts: np.concatenate(parts), *found)


@functools.partial(jax.jit, static_argnames=("objective", "method"))
def _apply(variables: Any, batch: Any, *, objective: Any, method: Any) -> Any:
  return objective.apply(variables, batch, method=method)
