"""Codes of point clouds, and the clouds that they decode to."""

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from bertjax.data.shapes import drawing, meshes
from bertjax.loading import LoadedModel
from bertjax.objectives import PointReconstruction
from bertjax.points import farthest_point_sampling

_TABLES = (".txt", ".xyz", ".csv", ".pts")
_NUM_POINTS = 1024  # of a model that does not say what it was trained on


@dataclasses.dataclass(frozen=True, eq=False)
class PointTokens:
  """A cloud in words.

  Attributes:
    codes: of the patches, int32 [g].
    centres: of the patches [g, 3], where they are in the cloud.
    points: decoded [g m, 3], in the cloud's own coordinates.
  """

  codes: np.ndarray
  centres: np.ndarray
  points: np.ndarray


def read_cloud(path: str | pathlib.Path, num_points: int) -> np.ndarray:
  """The points of a file, float32 [n, 3].

  Args:
    path: an array [n, 3 or more] (.npy), a table of x y z in text, separated
      by spaces or commas, or a mesh, whose surface is sampled.
    num_points: sampled from a mesh.

  Raises:
    ValueError: no such file, another kind of file, or one without points.
  """
  path = pathlib.Path(path)
  ending = path.suffix.lower()
  if not path.is_file():
    raise ValueError(f"{path} is not a file.")
  if ending in meshes.ENDINGS:
    return meshes.sampled(path, num_points)
  try:
    if ending == ".npy":
      rows = np.load(path)
    elif ending in _TABLES:
      text = path.read_text(encoding="utf-8").replace(",", " ")
      rows = np.loadtxt(text.splitlines(), ndmin=2)
    else:
      raise ValueError(
        f"the ending must be one of .npy, {', '.join(_TABLES)} (points) or"
        f" {', '.join(meshes.ENDINGS)} (meshes)"
      )
    rows = np.asarray(rows, np.float32)
  except ValueError as err:
    raise ValueError(f"{path} holds no points: {err}.") from err
  if rows.ndim != 2 or rows.shape[1] < 3 or not len(rows):
    raise ValueError(
      f"{path} holds an array of shape {rows.shape}; it should be [points, 3]."
    )
  return rows[:, :3]


def num_points_of(model: LoadedModel) -> int:
  """Points of a cloud that a model was trained on."""
  return _data(model).get("num_points", _NUM_POINTS)


def points_to_sample(model: LoadedModel) -> int:
  """Points of a mesh's surface that those of a cloud are drawn from."""
  return max(num_points_of(model), _data(model).get("stored_points") or 0)


def _data(model: LoadedModel) -> Mapping[str, Any]:
  """What the model was trained on; {} if it does not say."""
  return (model.config or {}).get("data", {})


def tokenize_points(
  model: LoadedModel, clouds: Sequence[np.ndarray], *, batch_size: int = 32
) -> list[PointTokens]:
  """The likeliest code of every patch of some clouds, and what they decode to.

  A cloud's points are drawn as those of an evaluation (the farthest ones first,
  if `data.farthest` says so), always the same, and moved into the unit sphere.

  Args:
    model: of the objective "point_reconstruction".
    clouds: [n, 3] each.
    batch_size: clouds at a time.

  Raises:
    ValueError: another kind of model, or no cloud.
  """
  if not isinstance(model.objective, PointReconstruction):
    raise ValueError(
      f"tokenize_points needs a model of objective 'point_reconstruction';"
      f" {model.path} has {model.objective_spec.get('name')!r}."
    )
  if not clouds:
    raise ValueError("There is no cloud; pass at least one (--input).")
  data = _data(model)
  prepared = [_prepared(x, num_points_of(model), data) for x in clouds]
  found = []
  for start in range(0, len(prepared), batch_size):
    part = prepared[start : start + batch_size]
    points = np.stack([x for x, _, _ in part]).astype(np.float32)
    said = jax.device_get(
      _outputs(model.variables, points, objective=model.objective)
    )
    for row, (_, centre, radius) in enumerate(part):
      found.append(
        PointTokens(
          said["codes"][row].astype(np.int32),
          said["centres"][row] * radius + centre,
          said["points"][row] * radius + centre,
        )
      )
  return found


@functools.partial(jax.jit, static_argnames=("objective",))
def _outputs(
  variables: Any, points: jax.Array, *, objective: nn.Module
) -> dict[str, jax.Array]:
  return objective.apply(variables, {"points": points}, method="outputs")


def _prepared(
  cloud: np.ndarray, num_points: int, data: Mapping[str, Any]
) -> tuple[np.ndarray, np.ndarray, float]:
  """Points as in training, and the shift and scale that were taken off."""
  rng = np.random.default_rng(0)
  if data.get("farthest"):
    count = min(data["stored_points"], len(cloud))
    cloud = cloud[np.asarray(farthest_point_sampling(cloud[None], count))[0]]
  draw = drawing.DRAWS[data.get("draw_eval") or data.get("draw", "subset")]
  points = cloud[draw(len(cloud), num_points, rng)].astype(np.float64)
  if not data.get("unit_sphere", True):
    return points, np.zeros(3), 1.0
  centre = points.mean(0)
  radius = max(float(np.linalg.norm(points - centre, axis=1).max()), 1e-12)
  return (points - centre) / radius, centre, radius


def write_cloud(path: str | pathlib.Path, points: np.ndarray) -> None:
  """Writes points [n, 3] as an array (.npy) or for viewers (.ply).

  Raises:
    ValueError: another ending.
  """
  path = pathlib.Path(path)
  if path.suffix == ".npy":
    np.save(path, points.astype(np.float32))
  elif path.suffix == ".ply":
    head = ["ply", "format ascii 1.0", f"element vertex {len(points)}"]
    head += [f"property float {axis}" for axis in "xyz"]
    lines = (" ".join(f"{x:.6g}" for x in row) for row in points)
    text = "\n".join([*head, "end_header", *lines])
    path.write_text(text + "\n", encoding="ascii")
  else:
    raise ValueError(f"{path} must end in .npy or .ply.")
