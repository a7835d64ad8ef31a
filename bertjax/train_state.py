"""What a training step carries, and how it is laid out on the mesh."""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from bertjax import optim
from bertjax.layers import statistics
from bertjax.parallel.sharding import logical_axes, parameter_shardings


@flax.struct.dataclass
class TrainState:
  """Everything that a checkpoint must hold to continue bitwise.

  As any tree it may also hold what describes its leaves: shapes, shardings.

  Attributes:
    step: optimizer steps taken, int32 scalar.
    params: parameter tree, float32.
    opt_state: state of the gradient transformation.
    key: PRNG key; step k uses `fold_in(key, k)`.
    extra: the objective's other collections (statistics, queues, teachers).
  """

  step: Any
  params: Any
  opt_state: Any
  key: Any
  extra: Any


def dummy_batch(spec: Mapping[str, jax.ShapeDtypeStruct]) -> dict:
  """Zeros of a batch's shapes, for tracing an initialisation."""
  return {k: jnp.zeros(v.shape, v.dtype) for k, v in spec.items()}


def abstract_variables(
  objective: nn.Module, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
) -> Any:
  """Shapes of an objective's variables, boxed with their logical axes."""
  # A key itself would need a device, and those of the mesh may not be here.
  key = jax.eval_shape(lambda: jax.random.key(0))
  return jax.eval_shape(functools.partial(_boxed, objective, batch_spec), key)


def _boxed(objective, batch_spec, key):
  """Variables of one trace, which serves for shapes and for values."""
  key = jax.random.split(key)[0]
  try:
    hash(objective)
  except TypeError:  # an attribute is an array or the like
    return _initialised(objective, batch_spec, key)
  return _jitted(objective, tuple(sorted(batch_spec.items())), key)


def _initialised(objective, batch_spec, key):
  return objective.init(
    {"params": key, "dropout": key}, dummy_batch(batch_spec), train=False
  )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _jitted(objective, batch_spec, key):
  return _initialised(objective, dict(batch_spec), key)


def linear_layers(
  objective: nn.Module, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, int]:
  """Linear layers by path, with the number of axes that they sum over."""
  return statistics.linear_layers(
    functools.partial(_initialised, objective, batch_spec, jax.random.key(0))
  )


def abstract_params(
  objective: nn.Module, batch_spec: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[Any, Any]:
  """Shapes of the parameters, and their logical axes as an equal tree."""
  params = abstract_variables(objective, batch_spec)["params"]
  return nn.meta.unbox(params), logical_axes(params)


def init_variables(
  objective: nn.Module,
  batch_spec: Mapping[str, jax.ShapeDtypeStruct],
  key: jax.Array,
) -> dict[str, Any]:
  """Parameters and other collections of an objective, without their boxes."""
  return nn.meta.unbox(_boxed(objective, batch_spec, key))


def start(
  transform: optax.GradientTransformation,
  variables: Mapping[str, Any],
  key: jax.Array,
) -> TrainState:
  """The state before the first step.

  Args:
    transform: whose state is made.
    variables: of `init_variables`.
    key: of what the steps draw.
  """
  extra = dict(variables)
  params = extra.pop("params")
  return TrainState(
    step=jnp.zeros((), jnp.int32),
    params=params,
    opt_state=transform.init(params),
    key=jax.random.split(key)[1],
    extra=extra,
  )


def init_state(
  objective: nn.Module,
  transform: optax.GradientTransformation,
  batch_spec: Mapping[str, jax.ShapeDtypeStruct],
  key: jax.Array,
  step_key: jax.Array | None = None,
) -> TrainState:
  """A fresh state; jit it with `state_shardings` to create it sharded.

  Args:
    objective: whose variables are made.
    transform: whose state is made.
    batch_spec: shapes of a batch.
    key: of initialisation.
    step_key: of what the steps draw; by default `key` as well.
  """
  variables = init_variables(objective, batch_spec, key)
  return start(transform, variables, key if step_key is None else step_key)


def state_shardings(
  objective: nn.Module,
  transform: optax.GradientTransformation,
  batch_spec: Mapping[str, jax.ShapeDtypeStruct],
  mesh: Mesh,
  key: jax.Array,
  step_key: jax.Array | None = None,
) -> tuple[TrainState, TrainState]:
  """The state's abstract form and a NamedSharding for each of its leaves.

  Optimizer state is sharded like its parameter; all else is replicated.
  """
  boxed = abstract_variables(objective, batch_spec)
  abstract = jax.eval_shape(
    functools.partial(start, transform),
    nn.meta.unbox(boxed),
    key if step_key is None else step_key,
  )
  params = parameter_shardings(
    abstract.params, logical_axes(boxed["params"]), mesh
  )
  whole = NamedSharding(mesh, PartitionSpec())
  shardings = jax.tree.map(lambda _: whole, abstract).replace(
    params=params,
    opt_state=optim.state_shardings(
      abstract.opt_state, abstract.params, params, whole
    ),
  )
  return abstract, shardings
