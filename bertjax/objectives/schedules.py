"""What an objective changes in the course of training, by its clock.

Each is a function of the step; see `bertjax.objectives.step.current_step`.
"""

import dataclasses

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class HalfCosine:
  """From `start` to `end` along half a cosine, constant around it.

  Attributes:
    start: value up to step `delay`.
    end: value from step `delay + steps` on.
    steps: between the two.
    delay: steps before it begins.
  """

  start: float
  end: float
  steps: int
  delay: int = 0

  def __call__(self, step: ArrayLike) -> Float[Array, "*n"]:
    part = jnp.clip((step - self.delay) / self.steps, 0, 1)
    rest = (1 + jnp.cos(jnp.pi * part)) / 2
    return self.end + (self.start - self.end) * rest


@dataclasses.dataclass(frozen=True)
class Staircase:
  """`start`, times `factor` after every `every` steps, never below `floor`.

  Attributes:
    start: value of the first stair.
    factor: in (0, 1], of a stair to the one before.
    every: steps of a stair.
    floor: smallest value.
  """

  start: float
  factor: float
  every: int
  floor: float = 0.0

  def __call__(self, step: ArrayLike) -> Float[Array, "*n"]:
    stair = jnp.asarray(step // self.every, jnp.float32)
    return jnp.maximum(self.start * self.factor**stair, self.floor)
