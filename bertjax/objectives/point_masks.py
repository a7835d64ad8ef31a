"""Which patches of a cloud are hidden, replaced, or exchanged with another's.

Everything is drawn anew in each step (Yu et al. 2022, sections 3.3 and 3.4).
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from bertjax.points import Patches, squared_distances


def block_mask(
  key: jax.Array, centres: Float[Array, "b g 3"], low: float, high: float
) -> Bool[Array, "b g"]:
  """The patches around one of them, a share of U(low, high) in each cloud.

  Args:
    key: PRNG key.
    centres: of the patches.
    low: smallest share; the number of patches is rounded down.
    high: largest share.
  """
  b, g, _ = centres.shape
  which, how_many = jax.random.split(key)
  first = jax.random.randint(which, (b,), 0, g)
  share = jax.random.uniform(how_many, (b,), minval=low, maxval=high)
  middle = jnp.take_along_axis(centres, first[:, None, None], axis=1)
  distances = squared_distances(middle, centres)[:, 0]
  rank = jnp.argsort(jnp.argsort(distances, axis=1), axis=1)
  return rank < jnp.floor(share * g)[:, None]


def block_hides(low: float, high: float, patches: int) -> bool:
  """Whether `block_mask` ever hides one of so many patches."""
  low, high = np.float32(low), np.float32(high)
  most = high * np.float32(patches)
  # A share is less than `high`, unless there is no other.
  return bool(most > 1 or (most == 1 and low == high))


def random_mask(
  key: jax.Array, centres: Float[Array, "b g 3"], low: float, high: float
) -> Bool[Array, "b g"]:
  """Each patch by itself, with one probability of U(low, high) for all clouds.

  Arguments are those of `block_mask`.
  """
  which, how_many = jax.random.split(key)
  share = jax.random.uniform(how_many, minval=low, maxval=high)
  return jax.random.uniform(which, centres.shape[:2]) < share


class Masking(NamedTuple):
  """A way to hide patches.

  Attributes:
    draw: `(key, centres, low, high) -> hidden`.
    bounded: whether no cloud has more than the largest share hidden.
  """

  draw: Callable[..., jax.Array]
  bounded: bool


MASKINGS: dict[str, Masking] = {
  "block": Masking(block_mask, bounded=True),
  "random": Masking(random_mask, bounded=False),
}


def replacements(
  key: jax.Array, masked: Bool[Array, "b g"], rate: float
) -> tuple[Int[Array, "b g"], Bool[Array, "b g"]]:
  """Where the embeddings of patches come from, and which are not their own.

  Those that are not hidden are exchanged with probability `rate` for those of a
  permutation of the whole batch.

  Args:
    key: PRNG key.
    masked: hidden patches.
    rate: probability.

  Returns:
    `sources` as `models.point_bert.inputs.moved` takes them, and which patches
    were chosen.
  """
  which, order = jax.random.split(key)
  chosen = (jax.random.uniform(which, masked.shape) < rate) & ~masked
  own = jnp.arange(masked.size).reshape(masked.shape)
  others = jax.random.permutation(order, masked.size).reshape(masked.shape)
  return jnp.where(chosen, others, own), chosen


class Mixture(NamedTuple):
  """Clouds of patches of two each.

  Attributes:
    ratios: the probability with which patches were kept.
    patches: points and centres.
    codes: of the patches.
  """

  ratios: Float[Array, " b"]
  patches: Patches
  codes: Int[Array, "b g"]


def mixed(
  key: jax.Array, patches: Patches, codes: Int[Array, "b g"]
) -> Mixture:
  """Mixes each cloud with the one as far from the batch's other end.

  Of an odd number the middle one stays what it is. A patch that goes is taken
  from the same place of the partner's list of patches.

  Args:
    key: PRNG key.
    patches: of the clouds.
    codes: of the patches.
  """
  share, which = jax.random.split(key)
  ratios = jax.random.uniform(share, codes.shape[:1])
  kept = jax.random.uniform(which, codes.shape) < ratios[:, None]

  def mix(x):
    wide = kept.reshape(*kept.shape, *(1,) * (x.ndim - 2))
    return jnp.where(wide, x, x[::-1])

  return Mixture(ratios, jax.tree.map(mix, patches), mix(codes))
