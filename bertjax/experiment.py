"""From a config to the parts of a run."""

import dataclasses
import functools
import inspect
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from bertjax import (
  fields,
  objectives,
  registry,
  resolve,
  train_state,
  train_step,
)
from bertjax.config import Settings, merge
from bertjax.data.base import Data
from bertjax.data.points import PointData
from bertjax.data.static import StaticData
from bertjax.data.text import TextData
from bertjax.evals import EVALUATORS, Evaluator
from bertjax.evals.base import check_batch
from bertjax.metrics import meters
from bertjax.models import DTYPES, MODELS
from bertjax.objectives.base import check_reads
from bertjax.optim import Optimizer, selection
from bertjax.parallel.mesh import make_mesh
from bertjax.programs import Program, Recipe, program_of
from bertjax.registry import lookup
from bertjax.stopping import StopRules, build_stop
from bertjax.tasks import TaskData
from bertjax.train_state import TrainState

DATA: dict[str, Callable[..., Data]] = {
  "text": TextData,
  "points": PointData,
  "static": StaticData,
  "task": TaskData,
}
INIT_GENERATOR = "threefry2x32"  # its numbers are the same on any mesh
GENERATORS = (INIT_GENERATOR, "rbg", "unsafe_rbg")


@dataclasses.dataclass(frozen=True)
class Experiment:
  """The parts that a config names, ready to run.

  Attributes:
    settings: the checked config, completed (see `bertjax.resolve`).
    mesh: the device mesh.
    data: what is read.
    objective: what is minimised.
    program: what is compiled for them.
    stop: when to end.
    batch_spec: shapes of the global batch.
    key: PRNG key of initialisation.
    step_key: PRNG key of dropout and whatever else a step draws.
  """

  settings: Settings
  mesh: Mesh
  data: Data
  objective: nn.Module
  program: Program
  stop: StopRules
  batch_spec: dict[str, jax.ShapeDtypeStruct]
  key: jax.Array
  step_key: jax.Array

  @property
  def optimizer(self) -> Optimizer:
    """How the objective is minimised."""
    return self.program.optimizer

  @property
  def abstract_state(self) -> TrainState:
    """Shapes of the train state, with shardings."""
    return self.program.abstract_state

  @functools.cached_property
  def step(self) -> train_step.Step:
    """The compiled training step."""
    return self.program.step()

  @functools.cached_property
  def stacked_axes(self) -> selection.AxesFn:
    """(name, parameter) -> axes that hold the layers of a scanned stack."""
    _, axes = train_state.abstract_params(self.objective, self.batch_spec)
    return selection.stacked_from_logical(axes)

  def init(self) -> TrainState:
    """A fresh state, created where it is sharded to."""
    return self.program.init(self.key, self.step_key)

  def evaluators(self) -> dict[str, tuple[int, Evaluator]]:
    """By name: steps between evaluations (0: only at the end), evaluator."""
    built = {}
    for name, spec in self.settings.evals.items():
      spec = dict(spec)
      every = spec.pop("every", 0)
      built[name] = every, build_evaluator(self, spec, f"evals.{name}")
    return built

  def baselines(self) -> dict[str, float]:
    """What guessing achieves where the evaluators look, by their names."""
    return {
      f"{name}/{key}": value
      for name, (_, evaluator) in self.evaluators().items()
      for key, value in evaluator.baseline().items()
    }

  def flops_per_token(self) -> float | None:
    """Training FLOPs of one token of a full row; None if nobody counted."""
    row = self.objective.row_flops(self.abstract_state.params, self.batch_spec)
    if row is None:
      return None
    return meters.TRAINING * row / self.data.dataset().tokens_per_batch(1)


def build_data(
  spec, *, seed: int, cache_dir: pathlib.Path, mask_seed: int | None = None
) -> Data:
  """What `config.data` describes: a row of `DATA`, by default "text".

  Args:
    spec: the sub-dict.
    seed: of the order of rows, and of masks.
    cache_dir: where vocabularies and token caches live.
    mask_seed: of masks, for data that draw some; `seed` by default.

  Raises:
    ValueError: an option that does not fit.
  """
  fields.check({"data": spec})
  spec = {"name": "text", **spec}
  context = dict(seed=seed, cache_dir=cache_dir)
  if takes(spec, "mask_seed"):
    context["mask_seed"] = mask_seed
  return registry.build(DATA, spec, "data", **context)


def takes(spec, option: str) -> bool:
  """Whether the data that `config.data` names have an option."""
  builder = lookup(DATA, spec.get("name", "text"), "data.name")
  return option in inspect.signature(builder).parameters


def build_evaluator(experiment: Experiment, spec, field: str) -> Evaluator:
  """One evaluator of the table `EVALUATORS`.

  Args:
    experiment: whose model is measured.
    spec: its name and options; `data` among them has the options in which what
      it reads differs from `config.data`, such as another source.
    field: the config field that holds `spec`, for messages.

  Raises:
    ValueError: names the field that does not fit.
  """
  options, data = dict(spec), experiment.data
  if (changes := options.pop("data", None)) is not None:
    data = _other_data(experiment, changes, f"{field}.data")
  evaluator = registry.build(
    EVALUATORS,
    options,
    field,
    objective=experiment.objective,
    data=data,
    mesh=experiment.mesh,
  )
  _check_rows(spec, data.batch_size, experiment.mesh, field)
  return evaluator


def _check_rows(
  spec: Mapping[str, Any], batch_size: int, mesh: Mesh, field: str
) -> None:
  """Refuses rows of an evaluation that batch shards do not divide.

  Args:
    spec: options of the evaluator.
    batch_size: of what it reads, unless `spec` says something else.
    mesh: of the run.
    field: that holds `spec`.

  Raises:
    ValueError: names the field.
  """
  read = spec.get("data") or {}
  for options, name in ((spec, field), (read, f"{field}.data")):
    if options.get("batch_size") is not None:
      check_batch(options["batch_size"], mesh, f"{name}.batch_size")
      return
  check_batch(batch_size, mesh, "data.batch_size")


def _other_data(experiment: Experiment, changes, field: str) -> Data:
  """The data of a run with other options.

  Raises:
    ValueError: names the field that does not fit.
  """
  settings = experiment.settings
  try:
    data = build_data(
      merge(settings.data, changes),
      seed=settings.seed_of("data"),
      mask_seed=settings.seed_of("masks"),
      cache_dir=settings.cache_path,
    )
    data.check(experiment.objective)
  except ValueError as err:
    raise ValueError(f"{field}: {err}") from err
  return data


def build_objective(settings: Settings, data: Data) -> nn.Module:
  """The model and its objective.

  Args:
    settings: the config.
    data: what will be read.

  Raises:
    ValueError: model, objective and data do not fit each other.
  """
  dtype = lookup(DTYPES, settings.dtype, "dtype")
  spec = data.model(settings.model)
  encoder = registry.build(MODELS, spec, "model", dtype=dtype)
  objective = objectives.build_objective(settings.objective, encoder)
  data.check(objective)
  return objective


def _optim(settings: Settings, mesh: Mesh) -> dict[str, Any]:
  """`config.optim` with a scale for the loss, if the dtype needs one.

  Raises:
    ValueError: the dtype has no use for one, or these devices not for it.
  """
  if settings.dtype != "float16":
    if settings.optim.get("loss_scale") is not None:
      raise ValueError(
        f"optim.loss_scale: dtype={settings.dtype!r} has float32's range;"
        " leave it out, or set dtype='float16'."
      )
    return dict(settings.optim)
  if mesh.devices.flat[0].platform == "tpu":
    raise ValueError(
      "dtype='float16': the matrix units of a TPU take bfloat16; use"
      " dtype='bfloat16'."
    )
  return {"loss_scale": {}, **settings.optim}


def _generator(name: str, mesh: Mesh) -> str:
  """A generator of `GENERATORS`; "auto" is the mesh's cheapest.

  Raises:
    ValueError: unknown name.
  """
  if name == "auto":
    on_tpu = mesh.devices.flat[0].platform == "tpu"
    return "rbg" if on_tpu else INIT_GENERATOR
  lookup(dict.fromkeys(("auto", *GENERATORS)), name, "prng")
  return name


def build(
  settings: Settings,
  *,
  devices: Any = None,
  data: Data | None = None,
) -> Experiment:
  """Everything that a run needs, from its config.

  Args:
    settings: the checked config.
    devices: for the mesh; all by default.
    data: replaces what `settings.data` describes.

  Raises:
    ValueError: names the field that does not fit.
  """
  mesh = registry.call(make_mesh, settings.mesh, "mesh", devices=devices)
  settings = dataclasses.replace(settings, prng=_generator(settings.prng, mesh))
  resolve.check_length(settings)
  settings = resolve.inherit(settings)
  if settings.seeds.get("masks") is not None and not takes(
    settings.data, "mask_seed"
  ):
    raise ValueError(
      f"seeds.masks={settings.seeds['masks']}: data.name="
      f"{settings.data['name']!r} draws no masks; leave it out."
    )
  if data is None:
    data = build_data(
      settings.data,
      seed=settings.seed_of("data"),
      mask_seed=settings.seed_of("masks"),
      cache_dir=settings.cache_path,
    )
  settings = resolve.complete(settings, data)
  stop = build_stop(settings.stop, settings.evals)
  train_step.check_batch(data.batch_size, settings.microbatches, mesh)
  for name, spec in settings.evals.items():
    # Here as well, so that a plan knows and training need not begin.
    _check_rows(spec, data.batch_size, mesh, f"evals.{name}")
  objective = build_objective(settings, data)
  batch_spec = data.batch_spec(data.batch_size)
  name = f"objective.name={settings.objective['name']!r}"
  check_reads(objective, batch_spec, name, "these data")
  program = program_of(
    Recipe(
      objective=objective,
      optim=_optim(settings, mesh),
      mesh=mesh,
      batch_spec=batch_spec,
      microbatches=settings.microbatches,
      total_steps=(
        settings.stop["steps"] if settings.horizon is None else settings.horizon
      ),
      tokens_per_step=data.dataset().tokens_per_batch(data.batch_size),
      init_generator=INIT_GENERATOR,
      step_generator=settings.prng,
    )
  )
  return Experiment(
    settings=settings,
    mesh=mesh,
    data=data,
    objective=objective,
    program=program,
    stop=stop,
    batch_spec=batch_spec,
    key=jax.random.key(settings.seed_of("init"), impl=INIT_GENERATOR),
    step_key=jax.random.key(settings.seed_of("dropout"), impl=settings.prng),
  )
