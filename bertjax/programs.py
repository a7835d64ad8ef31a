"""What runs of equal configs have in common, made once in a process.

Seeds, data and the rules that end a run are not compiled. The seeds of an
experiment, a run and its resumption, or a grid of data therefore share their
programs, which take longer to trace and to compile than a small model to train.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
from jax.sharding import Mesh

from bertjax import train_state, train_step
from bertjax.optim import Optimizer, build_optimizer
from bertjax.reuse import kept
from bertjax.train_state import TrainState


@dataclasses.dataclass(frozen=True)
class Recipe:
  """What a run's programs depend on.

  Attributes:
    objective: what is minimised.
    optim: as `build_optimizer` takes it.
    mesh: the device mesh.
    batch_spec: shapes of the global batch, by name.
    microbatches: parts of a batch.
    total_steps: of the schedule.
    tokens_per_step: of a global batch.
    init_generator: of the key that initial values are drawn from.
    step_generator: of the key that steps draw from.
  """

  objective: nn.Module
  optim: Mapping[str, Any]
  mesh: Mesh
  batch_spec: Mapping[str, jax.ShapeDtypeStruct]
  microbatches: int
  total_steps: int
  tokens_per_step: int
  init_generator: str
  step_generator: str


class Program:
  """What a recipe makes.

  Attributes:
    optimizer: how.
    abstract_state: shapes of the train state, with shardings.
  """

  def __init__(self, recipe: Recipe):
    """Traces shapes and compiles nothing yet.

    Raises:
      ValueError: names the field of an optimizer that does not fit.
    """
    self._recipe = recipe
    objective, batch_spec = recipe.objective, recipe.batch_spec
    # On the mesh, as `init`, which then need not trace again.
    with jax.set_mesh(recipe.mesh):
      params, axes = train_state.abstract_params(objective, batch_spec)
    self.optimizer: Optimizer = build_optimizer(
      recipe.optim,
      total_steps=recipe.total_steps,
      params=params,
      logical_axes=axes,
      tokens_per_step=recipe.tokens_per_step,
      mesh=recipe.mesh,
      linear_layers=lambda: train_state.linear_layers(objective, batch_spec),
    )
    keys = (
      jax.eval_shape(functools.partial(jax.random.key, 0, impl=generator))
      for generator in (recipe.init_generator, recipe.step_generator)
    )
    with jax.set_mesh(recipe.mesh):
      abstract, self._shardings = train_state.state_shardings(
        objective, self.optimizer.transform, batch_spec, recipe.mesh, *keys
      )
    self.abstract_state: TrainState = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      abstract,
      self._shardings,
    )

  @functools.cached_property
  def _jitted(self):
    recipe = self._recipe
    return train_step.jit_step(
      recipe.objective,
      self.optimizer,
      recipe.mesh,
      self._shardings,
      recipe.batch_spec,
      recipe.microbatches,
    )

  @functools.cached_property
  def _start(self):
    return jax.jit(
      functools.partial(train_state.start, self.optimizer.transform),
      out_shardings=self._shardings,
      donate_argnums=0,
    )

  def init(self, key: jax.Array, step_key: jax.Array) -> TrainState:
    """A fresh state, created where it is sharded to."""
    recipe, where = self._recipe, self._shardings
    # Apart, for it takes long to compile and is the same with any optimizer.
    variables = _initializer(
      recipe.objective,
      tuple(sorted(recipe.batch_spec.items())),
      *_flat({"params": where.params, **where.extra}),
    )
    with jax.set_mesh(recipe.mesh):
      return self._start(variables(key), step_key)

  def step(self) -> train_step.Step:
    """The compiled training step, for one run."""
    return train_step.runner(self._jitted, self.optimizer, self._recipe.mesh)


def _flat(tree: Any) -> tuple[tuple[Any, ...], Any]:
  """Leaves and structure, both of which have a hash."""
  leaves, structure = jax.tree.flatten(tree)
  return tuple(leaves), structure


@kept
def _initializer(objective, batch_spec, shardings, tree):
  """`train_state.init_variables`, jitted; hashable arguments."""
  return jax.jit(
    functools.partial(train_state.init_variables, objective, dict(batch_spec)),
    out_shardings=jax.tree.unflatten(tree, shardings),
  )


@dataclasses.dataclass(frozen=True)
class _Key:
  """A recipe, compared by values that stand for it."""

  recipe: Recipe = dataclasses.field(compare=False)
  values: tuple[Any, ...]


@kept
def _program(key: _Key) -> Program:
  return Program(key.recipe)


def program_of(recipe: Recipe) -> Program:
  """`Program(recipe)`, or that of an equal recipe not long before."""
  values = {
    field.name: getattr(recipe, field.name)
    for field in dataclasses.fields(recipe)
  }
  # What is no JSON, such as a function, is equal to itself alone.
  values["optim"] = json.dumps(dict(recipe.optim), sort_keys=True, default=id)
  values["batch_spec"] = tuple(sorted(recipe.batch_spec.items()))
  return _program(_Key(recipe, tuple(values.values())))
