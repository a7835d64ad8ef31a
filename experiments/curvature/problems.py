"""Two small problems of known difficulty, and how fast they are solved."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from bertjax import optim, train_state, train_step
from bertjax.layers.linear import Linear
from bertjax.optim import Optimizer
from bertjax.parallel.mesh import make_mesh
from bertjax.parallel.sharding import put_batch

LOOK = 5  # steps between two looks at held-out rows
_HELD_OUT = 512


class Layers(nn.Module):
  """Linear layers with tanh between; the loss is the mean row's squared error.

  Attributes:
    widths: of the outputs of each layer.
  """

  widths: tuple[int, ...]
  coefficients = {"squares": 1.0}
  fresh = ()

  def weights(self, batch):
    return {"squares": jnp.float32(len(batch["y"]))}

  @nn.compact
  def __call__(self, batch, *, train):
    del train
    hidden = batch["x"]
    for number, width in enumerate(self.widths):
      hidden = jnp.tanh(hidden) if number else hidden
      hidden = Linear(
        "be,ef->bf",
        (width,),
        ("norm", "norm"),
        kernel_init=nn.initializers.lecun_normal(),
        name=f"layer_{number}",
      )(hidden)
    return {"squares": jnp.sum(jnp.square(hidden - batch["y"]))}, {}


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is learned.

  Attributes:
    widths: of `Layers`.
    inputs: width of the input.
    condition: of the inputs' covariance in a regression; None for an
      autoencoder of low-rank images.
  """

  widths: tuple[int, ...]
  inputs: int
  condition: float | None

  def batch(self, rng: np.random.Generator, rows: int) -> dict[str, np.ndarray]:
    """Rows of inputs "x" and targets "y", float32."""
    fixed = np.random.default_rng(0)  # of the problem, not of the run
    if self.condition is None:
      # Images of rank 8 of uneven strength, squashed to (0, 1).
      basis = fixed.normal(size=(8, self.inputs))
      strength = np.logspace(0, -1, 8)
      values = (rng.normal(size=(rows, 8)) * strength) @ basis
      x = 1 / (1 + np.exp(-values))
      y = x
    else:
      rotation, _ = np.linalg.qr(fixed.normal(size=(self.inputs, self.inputs)))
      scales = np.logspace(0, -np.log10(self.condition) / 2, self.inputs)
      white = rng.normal(size=(rows, self.inputs))
      x = (white * scales) @ rotation.T + 0.5 * rotation[:, 0]
      # White targets: every direction of the inputs matters equally.
      y = white @ fixed.normal(size=(self.inputs, self.widths[-1]))
    return {"x": x.astype(np.float32), "y": y.astype(np.float32)}


PROBLEMS = {
  "regression": Problem(widths=(10,), inputs=32, condition=1e3),
  "autoencoder": Problem(widths=(48, 12, 64), inputs=64, condition=None),
}


def solve(
  *,
  problem: str,
  optimizer: dict[str, Any],
  seeds: int,
  steps: int,
  batch_size: int,
) -> dict[str, Any]:
  """Held-out losses of several runs; a problem compiles once for all of them.

  Args:
    problem: key of `PROBLEMS`.
    optimizer: as `config.optim`.
    seeds: runs, which differ in initial parameters and batches.
    steps: of each.
    batch_size: rows of a batch, which is fresh at every step.

  Returns:
    "losses": per seed, every `LOOK` steps, as shares of the loss at the start;
    shorter if it became not finite.
  """
  task = PROBLEMS[problem]
  run = _Run(task, optimizer, steps, batch_size)
  return {"losses": [run(seed) for seed in range(seeds)]}


class _Run:
  """A problem and an optimizer, compiled."""

  def __init__(self, task, options, steps, batch_size):
    self._task, self._steps, self._rows = task, steps, batch_size
    self._objective = Layers(task.widths)
    self._mesh = make_mesh(devices=jax.devices()[:1])
    example = task.batch(np.random.default_rng(0), batch_size)
    spec = {
      k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in example.items()
    }
    optimizer = self._optimizer(options, spec)
    _, shardings = train_state.state_shardings(
      self._objective,
      optimizer.transform,
      spec,
      self._mesh,
      jax.random.key(0),
    )
    make = functools.partial(
      train_state.init_state, self._objective, optimizer.transform, spec
    )
    self._init = jax.jit(make, out_shardings=shardings)
    self._step = train_step.compile_step(
      self._objective, optimizer, self._mesh, shardings, spec
    )
    self._loss = jax.jit(self._mean)

  def _optimizer(self, options, spec) -> Optimizer:
    params, names = train_state.abstract_params(self._objective, spec)
    return optim.build_optimizer(
      options,
      total_steps=self._steps,
      params=params,
      logical_axes=names,
      mesh=self._mesh,
      linear_layers=lambda: train_state.linear_layers(self._objective, spec),
    )

  def _mean(self, params, batch):
    sums, _ = self._objective.apply({"params": params}, batch, train=False)
    return sums["squares"] / len(batch["y"])

  def __call__(self, seed: int) -> list[float]:
    """Held-out losses as shares of the first."""
    held_out = self._task.batch(np.random.default_rng(10_000), _HELD_OUT)
    rng = np.random.default_rng(seed)
    with jax.set_mesh(self._mesh):
      state = self._init(jax.random.key(seed))
    first, losses = float(self._loss(state.params, held_out)), []
    for step in range(1, self._steps + 1):
      batch = self._task.batch(rng, self._rows)
      state, _ = self._step(state, put_batch(batch, self._mesh))
      if step % LOOK == 0:
        losses.append(float(self._loss(state.params, held_out)) / first)
        if not np.isfinite(losses[-1]):
          return losses[:-1]
    return losses
