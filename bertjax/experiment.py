"""From a config to the parts of a run."""

import dataclasses
import functools
import inspect
import pathlib
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from bertjax import registry, resolve, train_state, train_step
from bertjax.config import Settings
from bertjax.data.base import Data
from bertjax.data.static import StaticData
from bertjax.data.text import TextData
from bertjax.evals import EVALUATORS, Evaluator
from bertjax.metrics import meters
from bertjax.models import DTYPES, MODELS
from bertjax.objectives import OBJECTIVES
from bertjax.optim import Optimizer, build_optimizer, selection
from bertjax.parallel.mesh import make_mesh
from bertjax.registry import lookup
from bertjax.rules import path_name
from bertjax.stopping import StopRules, build_stop
from bertjax.tasks import TaskData
from bertjax.train_state import TrainState

DATA: dict[str, Callable[..., Data]] = {
  "text": TextData,
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
    optimizer: how.
    stop: when to end.
    batch_spec: shapes of the global batch.
    abstract_state: shapes of the train state, with shardings.
    key: PRNG key of initialisation.
    step_key: PRNG key of dropout and whatever else a step draws.
  """

  settings: Settings
  mesh: Mesh
  data: Data
  objective: nn.Module
  optimizer: Optimizer
  stop: StopRules
  batch_spec: dict[str, jax.ShapeDtypeStruct]
  abstract_state: TrainState
  key: jax.Array
  step_key: jax.Array

  @functools.cached_property
  def shardings(self) -> TrainState:
    """A NamedSharding for every leaf of the state."""
    return jax.tree.map(lambda leaf: leaf.sharding, self.abstract_state)

  @functools.cached_property
  def step(self) -> train_step.Step:
    """The compiled training step."""
    return train_step.compile_step(
      self.objective,
      self.optimizer,
      self.mesh,
      self.shardings,
      self.batch_spec,
      self.settings.microbatches,
    )

  @functools.cached_property
  def stacked_axes(self) -> selection.AxesFn:
    """(name, parameter) -> axes that hold the layers of a scanned stack."""
    _, axes = train_state.abstract_params(self.objective, self.batch_spec)
    return selection.stacked_from_logical(axes)

  def init(self) -> TrainState:
    """A fresh state, created where it is sharded to."""
    make = functools.partial(
      train_state.init_state,
      self.objective,
      self.optimizer.transform,
      self.batch_spec,
    )
    with jax.set_mesh(self.mesh):
      return jax.jit(make, out_shardings=self.shardings)(
        self.key, self.step_key
      )

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

  def flops_per_token(self) -> float:
    """Training FLOPs of one token of a full row."""
    row = meters.train_flops(
      **model_sizes(self.abstract_state.params),
      seq_len=self.data.seq_len,
      max_masked=self.data.vocabulary_slots,
    )
    return row / self.data.seq_len


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
  spec = {"name": "text", **spec}
  context = dict(seed=seed, cache_dir=cache_dir)
  if _draws_masks(spec):
    context["mask_seed"] = mask_seed
  return registry.build(DATA, spec, "data", **context)


def _draws_masks(spec) -> bool:
  """Whether `config.data` masks as it reads."""
  builder = lookup(DATA, spec.get("name", "text"), "data.name")
  return "mask_seed" in inspect.signature(builder).parameters


def build_evaluator(experiment: Experiment, spec, field: str) -> Evaluator:
  """One evaluator of the table `EVALUATORS`."""
  return registry.build(
    EVALUATORS,
    spec,
    field,
    objective=experiment.objective,
    data=experiment.data,
    mesh=experiment.mesh,
  )


def model_sizes(params: Any) -> dict[str, int]:
  """Dimensions of an encoder, read off its (abstract) parameters."""
  leaves = {
    path_name(path): leaf
    for path, leaf in jax.tree_util.tree_leaves_with_path(params["encoder"])
  }
  vocab_size, emb_dim = leaves["embeddings/token/embedding"].shape
  inner = [v for k, v in leaves.items() if k.endswith("mlp/up/bias")]
  mlp_dim = inner[0].shape[-1]
  return dict(
    vocab_size=vocab_size,
    emb_dim=emb_dim,
    mlp_dim=mlp_dim,
    num_layers=sum(v.size for v in inner) // mlp_dim,
  )


def build_objective(
  settings: Settings, *, vocab_size: int, seq_len: int
) -> nn.Module:
  """The model and its objective.

  Args:
    settings: the config.
    vocab_size: of the tokenizer; `model.vocab_size` may be larger.
    seq_len: of the data.

  Raises:
    ValueError: the model's table of tokens or positions is too small.
  """
  dtype = lookup(DTYPES, settings.dtype, "dtype")
  spec = {"vocab_size": vocab_size, **settings.model}
  if spec["vocab_size"] < vocab_size:
    raise ValueError(
      f"model.vocab_size={spec['vocab_size']} is smaller than the tokenizer's"
      f" {vocab_size}; use at least that, or leave it out."
    )
  encoder = registry.build(MODELS, spec, "model", dtype=dtype)
  longest = encoder.make_embeddings().max_positions
  if seq_len > longest:
    raise ValueError(
      f"data.seq_len={seq_len} exceeds model.max_positions={longest}; shorten"
      " the one or raise the other."
    )
  return registry.build(
    OBJECTIVES, settings.objective, "objective", encoder=encoder
  )


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
  if settings.seeds.get("masks") is not None and not _draws_masks(
    settings.data
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
  objective = build_objective(
    settings, vocab_size=data.tokenizer.vocab_size, seq_len=data.seq_len
  )
  batch_spec = data.batch_spec(data.batch_size)
  params, axes = train_state.abstract_params(objective, batch_spec)
  optimizer = build_optimizer(
    settings.optim,
    total_steps=settings.horizon or settings.stop["steps"],
    params=params,
    logical_axes=axes,
    tokens_per_step=data.dataset().tokens_per_batch(data.batch_size),
    mesh=mesh,
    linear_layers=lambda: train_state.linear_layers(objective, batch_spec),
  )
  key = jax.random.key(settings.seed_of("init"), impl=INIT_GENERATOR)
  step_key = jax.random.key(settings.seed_of("dropout"), impl=settings.prng)
  abstract, shardings = train_state.state_shardings(
    objective, optimizer.transform, batch_spec, mesh, key, step_key
  )
  abstract = jax.tree.map(
    lambda leaf, sharding: jax.ShapeDtypeStruct(
      leaf.shape, leaf.dtype, sharding=sharding
    ),
    abstract,
    shardings,
  )
  return Experiment(
    settings=settings,
    mesh=mesh,
    data=data,
    objective=objective,
    optimizer=optimizer,
    stop=stop,
    batch_spec=batch_spec,
    abstract_state=abstract,
    key=key,
    step_key=step_key,
  )
