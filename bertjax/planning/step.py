"""The training step of a config, lowered for devices that nobody here has."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from bertjax import experiment as experiment_lib
from bertjax import resolve
from bertjax.config import Settings
from bertjax.data.abstract import abstract_text
from bertjax.data.points import abstract_points
from bertjax.experiment import Experiment
from bertjax.parallel.sharding import batch_sharding
from bertjax.registry import lookup
from bertjax.tasks.abstract import abstract_task


@dataclasses.dataclass(frozen=True)
class StepFacts:
  """What is known of a step before it is compiled.

  Attributes:
    mesh: size of each axis.
    batch_size: rows of the global batch.
    seq_len: slots of a row.
    unit: what stands in a slot.
    dtype: that the model computes in.
    microbatches: parts of the batch.
    extra_bytes: on one device, of the objective's other collections: frozen
      models, teachers, statistics.
    vocab_size: rows of the token embedding, or codes; None without any.
    parameters: number of them, over all devices.
    parameter_bytes: on one device.
    optimizer_bytes: on one device.
    batch_bytes: on one device.
    model_flops: that the model needs for a batch of full rows; None if nobody
      has counted them.
  """

  mesh: Mapping[str, int]
  batch_size: int
  seq_len: int
  vocab_size: int | None
  parameters: int
  parameter_bytes: int
  optimizer_bytes: int
  batch_bytes: int
  model_flops: float | None
  unit: str = "tokens"
  dtype: str = "float32"
  microbatches: int = 1
  extra_bytes: int = 0

  @property
  def tokens(self) -> int:
    """Slots of a batch."""
    return self.batch_size * self.seq_len


def build(
  devices: Sequence[Any], *, settings: Settings, vocab_size: int | None = None
) -> Experiment:
  """A config's experiment, for whose shapes no data are read but static ones.

  Args:
    devices: for the mesh.
    settings: the config of one stage.
    vocab_size: of the tokenizer, if the config does not tell.

  Raises:
    ValueError: the config does not fit the devices, or a size of a vocabulary
      that is read, naming the field.
  """
  settings = _without_folder(settings)
  name = settings.data.get("name", "text")
  data, make = None, _ABSTRACT.get(name)
  if make is not None:
    data = make(settings.data, vocab_size)
  elif vocab_size is not None:
    lookup(experiment_lib.DATA, name, "data.name")
    raise ValueError(
      f"vocab_size={vocab_size} is for data that are not here;"
      f" data.name={name!r} is read with its tokenizer, leave it out."
    )
  return experiment_lib.build(settings, devices=devices, data=data)


def lower_step(
  devices: Sequence[Any], *, settings: Settings, vocab_size: int | None = None
) -> tuple[jax.stages.Lowered, StepFacts]:
  """A target of `bertjax.hardware.compile_for`; arguments of `build`."""
  experiment = build(devices, settings=settings, vocab_size=vocab_size)
  batch = {
    name: jax.ShapeDtypeStruct(
      leaf.shape,
      leaf.dtype,
      sharding=batch_sharding(experiment.mesh, leaf.ndim),
    )
    for name, leaf in experiment.batch_spec.items()
  }
  with jax.set_mesh(experiment.mesh):
    lowered = experiment.step.jitted.lower(experiment.abstract_state, batch)
  facts = dataclasses.replace(
    _facts(experiment, batch),
    dtype=settings.dtype,
    microbatches=settings.microbatches,
  )
  return lowered, facts


# By name of the data; what is not here has to be read.
_ABSTRACT = {
  "points": abstract_points,
  "task": abstract_task,
  "text": abstract_text,
}


def _without_folder(settings: Settings) -> Settings:
  """The settings with what `init_from` says of the model, if it is here.

  Raises:
    ValueError: it is not, and the config does not name a model either.
  """
  path = (settings.init_from or {}).get("path")
  if path is None:
    return settings
  if pathlib.Path(path).is_dir():
    return resolve.inherit(settings)
  if "name" not in settings.model:
    raise ValueError(
      f"init_from.path={str(path)!r} is not here, so the model is unknown; name"
      " one for the plan, as --config.model.name=bert"
      " --config.model.size=base."
    )
  return dataclasses.replace(settings, init_from=None)


def _facts(experiment: Experiment, batch: Mapping[str, Any]) -> StepFacts:
  state, data = experiment.abstract_state, experiment.data
  rows = data.dataset()
  slots, flops = rows.tokens_per_batch(1), experiment.flops_per_token()
  return StepFacts(
    mesh=dict(experiment.mesh.shape),
    batch_size=data.batch_size,
    seq_len=slots,
    unit=rows.unit,
    vocab_size=getattr(experiment.objective.encoder, "vocab_size", None),
    parameters=sum(leaf.size for leaf in jax.tree.leaves(state.params)),
    parameter_bytes=device_bytes(state.params),
    optimizer_bytes=device_bytes(state.opt_state),
    extra_bytes=device_bytes(state.extra),
    batch_bytes=device_bytes(batch),
    model_flops=None if flops is None else data.batch_size * slots * flops,
  )


def device_bytes(tree: Any) -> int:
  """Bytes that one device holds of a tree of arrays, abstract or not."""
  return sum(
    math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    for leaf in jax.tree.leaves(tree)
  )
