"""A small regression over workers, through the one train step."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import Dtype

from bertjax import optim, train_state, train_step
from bertjax.layers.linear import Linear
from bertjax.parallel.mesh import make_mesh
from bertjax.parallel.sharding import constrain, put_batch

ROWS, INPUTS, HIDDEN, OUTPUTS = 16, 8, 12, 4


def _dense(shape, names):
  init = nn.initializers.normal(0.5)
  return nn.with_logical_partitioning(init, names), shape


class Regression(nn.Module):
  """Two layers; `dead` gets no gradient."""

  coefficients = {"squares": 1.0}
  independent_rows = True
  fresh = ()

  def weights(self, batch):
    return {"squares": jnp.sum(batch["weight"])}

  @nn.compact
  def __call__(self, batch, *, train):
    del train
    up = self.param("up", *_dense((INPUTS, HIDDEN), ("norm", "embed")))
    down = self.param("down", *_dense((HIDDEN, OUTPUTS), ("norm", "mlp")))
    bias = self.param("bias", *_dense((OUTPUTS,), ("norm",)))
    self.param("dead", *_dense((6,), ("norm",)))
    inputs = constrain(batch["x"], ("batch", None))
    found = jnp.tanh(inputs @ up) @ down + bias[None]
    squares = jnp.square(found - batch["y"]).sum(-1) * batch["weight"]
    return {"squares": squares.sum()}, {}


class Dense(nn.Module):
  """Two linear layers, the second without a bias, around the same tanh.

  Attributes:
    dtype: in which they are computed.
  """

  dtype: Dtype = jnp.float32

  coefficients = {"squares": 1.0}
  independent_rows = True
  fresh = ()

  def weights(self, batch):
    return {"squares": jnp.sum(batch["weight"])}

  @nn.compact
  def __call__(self, batch, *, train):
    del train
    init = nn.initializers.normal(0.5)
    inputs = constrain(batch["x"], ("batch", None))
    hidden = Linear(
      "be,ef->bf",
      (HIDDEN,),
      ("norm", "norm"),
      kernel_init=init,
      dtype=self.dtype,
      name="up",
    )(inputs)
    found = Linear(
      "be,ef->bf",
      (OUTPUTS,),
      ("norm", "norm"),
      kernel_init=init,
      use_bias=False,
      dtype=self.dtype,
      name="down",
    )(jnp.tanh(hidden))
    squares = jnp.square(found - batch["y"]).sum(-1) * batch["weight"]
    return {"squares": squares.sum()}, {}


def batch(step: int = 0) -> dict[str, np.ndarray]:
  """Rows of unequal weight, so that workers weigh differently."""
  rng = np.random.default_rng(step)
  x = rng.normal(size=(ROWS, INPUTS))
  y = x[:, :OUTPUTS] - np.sin(x[:, OUTPUTS:])
  weight = rng.integers(1, 4, ROWS)
  return {
    k: v.astype(np.float32) for k, v in dict(x=x, y=y, weight=weight).items()
  }


def _mappings(pairs):
  """Nested pairs of names and values -> dicts."""
  return {
    name: _mappings(value) if isinstance(value, tuple) else value
    for name, value in pairs
  }


class World:
  """An optimizer on a mesh.

  Attributes:
    step: the compiled training step.
    abstract: shapes and shardings of the state.
  """

  def __init__(
    self,
    microbatches=1,
    total_steps=40,
    axes=None,
    objective=None,
    devices=None,
    **options,
  ):
    axes = dict(data=4) if axes is None else axes
    if devices is None:
      devices = jax.devices()[: int(np.prod(list(axes.values())))]
    self.mesh = make_mesh(**axes, devices=devices)
    self._objective = Regression() if objective is None else objective
    self._spec = {
      k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch().items()
    }
    params, names = train_state.abstract_params(self._objective, self._spec)
    options = dict(learning_rate=0.02) | options
    # Pairs, which a cache can hash.
    for name in ("schedule", "precondition", "loss_scale"):
      if name in options:
        options[name] = _mappings(options[name])
    self.optimizer = optim.build_optimizer(
      options,
      total_steps=total_steps,
      params=params,
      logical_axes=names,
      mesh=self.mesh,
      linear_layers=lambda: train_state.linear_layers(
        self._objective, self._spec
      ),
    )
    abstract, shardings = train_state.state_shardings(
      self._objective,
      self.optimizer.transform,
      self._spec,
      self.mesh,
      jax.random.key(0),
    )
    self.abstract = jax.tree.map(
      lambda leaf, sharding: jax.ShapeDtypeStruct(
        leaf.shape, leaf.dtype, sharding=sharding
      ),
      abstract,
      shardings,
    )
    make = functools.partial(
      train_state.init_state,
      self._objective,
      self.optimizer.transform,
      self._spec,
    )
    self._init = jax.jit(make, out_shardings=shardings)
    self.step = train_step.compile_step(
      self._objective,
      self.optimizer,
      self.mesh,
      shardings,
      self._spec,
      microbatches,
    )

  def init(self):
    """A fresh state."""
    with jax.set_mesh(self.mesh):
      return self._init(jax.random.key(0))

  def run(self, state, start, stop, change=lambda step, batch: batch):
    """Steps [start, stop): the state and the losses."""
    losses = []
    for index in range(start, stop):
      rows = change(index, batch(index))
      state, metrics = self.step(state, put_batch(rows, self.mesh))
      losses.append(float(metrics["loss"][0]))
    return state, losses

  def lower(self):
    """The step, lowered."""
    return self.step.jitted.lower(
      self.abstract,
      {
        k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in self._spec.items()
      },
    )


@functools.cache
def world(
  microbatches=1,
  total_steps=40,
  axes=(("data", 4),),
  objective=None,
  **options,
):
  """A `World`, compiled once per set of options."""
  return World(microbatches, total_steps, dict(axes), objective, **options)


def lowered(devices, **options):
  """A step with linear layers on devices that nobody here has."""
  w = World(
    axes=dict(data=len(devices)), objective=Dense(), devices=devices, **options
  )
  with jax.set_mesh(w.mesh):
    return w.lower()
