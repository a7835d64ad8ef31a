"""The discrete autoencoder whose codes are a cloud's words."""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

from bertjax import points
from bertjax.models.point_bert.dgcnn import DGCNN
from bertjax.models.point_bert.folding import Folding
from bertjax.models.point_bert.patch_embedding import (
  MiniPointNet,
  check_shrink,
)
from bertjax.points import Patches


class Reconstruction(NamedTuple):
  """Patches after coding and decoding.

  Attributes:
    logits: of the codes.
    coarse: a quarter of the points.
    fine: all of them.
  """

  logits: Float[Array, "b g v"]
  coarse: Float[Array, "b g k 3"]
  fine: Float[Array, "b g m 3"]


class PointTokenizer(nn.Module):
  """Patches to codes and back (section 3.2).

  Attributes:
    size: points of a patch.
    vocab_size: codes v.
    features: width of patches and codes.
    dtype: compute dtype.
    patches: of a cloud, g.
    skip_near_origin: see `points.farthest_point_sampling`.
    shrink: by what the widths of hidden layers are divided.
  """

  size: int = 32
  vocab_size: int = 8192
  features: int = 256
  dtype: Dtype = jnp.float32
  patches: int = 64
  skip_near_origin: bool = False
  shrink: int = 1

  @property
  def least_points(self) -> int:
    """Of a cloud that can be cut into patches."""
    return max(self.patches, self.size)

  def group(self, cloud: Float[Array, "b n 3"]) -> Patches:
    """The patches that everything else takes."""
    return points.group(
      cloud,
      self.patches,
      self.size,
      skip_near_origin=self.skip_near_origin,
    )

  def setup(self):
    self.embed = MiniPointNet(self.features, self.dtype, self.shrink)
    self.to_codes = DGCNN(self.vocab_size, self.dtype, self.shrink)
    self.codebook = self.param(
      "codebook",
      nn.initializers.normal(1.0),
      (self.vocab_size, self.features),
      jnp.float32,
    )
    self.from_codes = DGCNN(self.features, self.dtype, self.shrink)
    self.decode = Folding(self.size, self.dtype, self.shrink)

  def embedded(
    self, patches: Patches, *, train: bool = False
  ) -> Float[Array, "b g e"]:
    """A vector for each patch, before any code is chosen."""
    return self.embed(patches.points, train=train)

  def logits(
    self, patches: Patches, *, train: bool = False
  ) -> Float[Array, "b g v"]:
    """Of the codes, float32, after the LeakyReLU that ends `DGCNN`.

    Args:
      patches: of clouds.
      train: whether BatchNorm takes the batch's statistics. The authors' labels
        for pre-training come from a tokenizer that does.
    """
    embedded = self.embedded(patches, train=train)
    found = self.to_codes(embedded, patches.centres)
    return found.astype(jnp.float32)

  def codes(
    self, patches: Patches, *, train: bool = False
  ) -> Int[Array, "b g"]:
    """The likeliest code of each patch, without noise or gradient."""
    logits = jax.lax.stop_gradient(self.logits(patches, train=train))
    return logits.argmax(-1).astype(jnp.int32)

  def __call__(
    self,
    patches: Patches,
    *,
    train: bool,
    temperature: float | Float[Array, ""] = 1.0,
    hard: bool = False,
  ) -> Reconstruction:
    """Codes and decodes.

    Args:
      patches: of clouds.
      train: BatchNorm takes the batch's statistics.
      temperature: of the Gumbel-softmax; noise is drawn from the stream
        "gumbel" if there is one.
      hard: one code a patch, with the gradient of the soft mixture.
    """
    logits = self.logits(patches, train=train)
    noise = 0.0
    if self.has_rng("gumbel"):
      noise = jax.random.gumbel(self.make_rng("gumbel"), logits.shape)
    soft = jax.nn.softmax((logits + noise) / temperature)
    if hard:
      one = jax.nn.one_hot(soft.argmax(-1), self.vocab_size, dtype=soft.dtype)
      soft = one + soft - jax.lax.stop_gradient(soft)
    mixed = jnp.einsum(
      "bgv,ve->bge", soft.astype(self.dtype), self.codebook.astype(self.dtype)
    )
    features = self.from_codes(mixed, patches.centres)
    return Reconstruction(logits, *self.decode(features, train=train))


def point_tokenizer(
  *,
  patches: int = 64,
  patch_size: int = 32,
  vocab_size: int = 8192,
  features: int = 256,
  skip_near_origin: bool = False,
  shrink: int = 1,
  dtype: Dtype = jnp.float32,
) -> PointTokenizer:
  """The paper's tokenizer, by default of its size.

  Args:
    patches: of a cloud.
    patch_size: points of each, a multiple of 4.
    vocab_size: codes; a multiple of 4, for norms of four groups.
    features: width of patches and codes; a multiple of 4.
    skip_near_origin: see `points.farthest_point_sampling`.
    shrink: by what the widths of hidden layers are divided: 1 is the paper's, 8
      trains in minutes on a CPU.
    dtype: compute dtype; parameters are float32.

  Raises:
    ValueError: a number that is not positive or not a multiple of 4.
  """
  if patches < 1:
    raise ValueError(f"model.patches={patches} must be at least 1.")
  fours = dict(patch_size=patch_size, vocab_size=vocab_size, features=features)
  for name, value in fours.items():
    if value < 4 or value % 4:
      raise ValueError(f"model.{name}={value} must be a multiple of 4.")
  check_shrink(shrink)
  return PointTokenizer(
    patch_size,
    vocab_size,
    features,
    dtype,
    patches=patches,
    skip_near_origin=skip_near_origin,
    shrink=shrink,
  )


def uniformity(logits: Float[Array, "b g v"]) -> Float[Array, " b"]:
  """KL(uniform || mean over a cloud's patches of their codes' softmax)."""
  mean = jax.nn.softmax(logits).mean(1)
  share = 1 / logits.shape[-1]
  return (share * (jnp.log(share) - jnp.log(mean))).sum(-1)
