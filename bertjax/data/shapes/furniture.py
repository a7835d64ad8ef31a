"""Clouds sampled from furniture libraries of Sweet Home 3D (*.sh3f).

Debian's package sweethome3d-furniture has five of them, 820 models under CC-BY
and CC0. A library is a zip archive of OBJ files and a catalogue.
"""

import io
import pathlib
import re
import zipfile
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from bertjax.data.shapes import meshes
from bertjax.data.shapes.files import Cloud, Clouds
from bertjax.data.sources.base import fingerprint_of

_CATALOGUE = "PluginFurnitureCatalog.properties"


class Model(NamedTuple):
  """A line of a catalogue.

  Attributes:
    library: archive that it is in.
    member: name of its OBJ file there.
    category: of the catalogue.
  """

  library: pathlib.Path
  member: str
  category: str


def catalogue(library: pathlib.Path) -> list[Model]:
  """The OBJ models of a library, in the order of its catalogue.

  Raises:
    ValueError: it is no such library.
  """
  try:
    with zipfile.ZipFile(library) as archive:
      text = archive.read(_CATALOGUE).decode("latin-1")
      members = set(archive.namelist())
  except (KeyError, zipfile.BadZipFile) as err:
    raise ValueError(f"{library} is no library of furniture: {err}.") from err
  fields: dict[str, dict[str, str]] = {"model": {}, "category": {}}
  for line in text.splitlines():
    if found := re.match(r"(model|category)#(\d+)=(.*)", line):
      name, number, value = found.groups()
      fields[name][number] = value.strip()
  models = (
    Model(library, member.lstrip("/"), fields["category"].get(number, "other"))
    for number, member in fields["model"].items()
  )
  return [
    m for m in models if m.member.endswith(".obj") and m.member in members
  ]


class Furniture(Clouds):
  """Models of a split, their class the catalogue's category."""

  def __init__(
    self, models: Sequence[Model], classes: Sequence[str], num_points: int
  ):
    """Args:
    models: of the split.
    classes: all categories, those of other splits too.
    num_points: of each cloud.
    """
    numbers = {name: i for i, name in enumerate(classes)}
    super().__init__(
      [m.library for m in models], [numbers[m.category] for m in models]
    )
    self.classes = tuple(classes)
    self._models, self._num_points = list(models), num_points

  def __getitem__(self, index: int) -> Cloud:
    model = self._models[index]
    with zipfile.ZipFile(model.library) as archive:
      file = io.BytesIO(archive.read(model.member))
    path = pathlib.Path(model.member)
    points = meshes.sampled(path, self._num_points, file)
    return Cloud(points.astype(np.float32), self._labels[index])

  def fingerprint(self) -> str:
    members = [m.member for m in self._models]
    return fingerprint_of(super().fingerprint(), members, self._num_points)
