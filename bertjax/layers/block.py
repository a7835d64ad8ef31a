"""An encoder block: a mixer, a feed-forward, norms and a residual rule."""

from collections.abc import Callable

import flax.linen as nn
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from bertjax.layers.drop_path import DropPath
from bertjax.layers.dropout import Dropout
from bertjax.parallel.sharding import constrain

Layer = Callable[[Array], Array]
Residual = Callable[[Array, Layer, Layer], Array]

# What remat policies call the sum of a sublayer's input and output.
SUM = "residual_sum"


def _add(x: Array, y: Array) -> Array:
  return checkpoint_name(x + y, SUM)


def post_norm(x: Array, layer: Layer, norm: Layer) -> Array:
  """`norm(x + layer(x))`, the original Transformer and BERT."""
  return norm(_add(x, layer(x)))


def pre_norm(x: Array, layer: Layer, norm: Layer) -> Array:
  """`x + layer(norm(x))` (Xiong et al. 2020); the encoder norms its output."""
  return _add(x, layer(norm(x)))


def no_norm(x: Array, layer: Layer, norm: Layer) -> Array:
  """`x + layer(x)`; the norm is never built."""
  del norm
  return _add(x, layer(x))


RESIDUALS: dict[str, Residual] = {
  "post": post_norm,
  "pre": pre_norm,
  "none": no_norm,
}


class Block(nn.Module):
  """One layer of an encoder.

  Attributes:
    mixer: makes the layer that mixes positions; called as `mixer()(x,
      segment_ids, train=..., **shared)`. It names itself ("attention" in BERT).
    feed_forward: makes the position-wise layer, named "mlp" in BERT.
    norm: makes a norm; called with `name`.
    residual: how layer, norm and skip connection combine.
    dropout_rate: dropout of each sublayer's output.
  """

  mixer: Callable[[], nn.Module]
  feed_forward: Callable[[], nn.Module]
  norm: Callable[..., nn.Module]
  residual: Residual = post_norm
  dropout_rate: float = 0.0

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "b t e"],
    segment_ids: Int[Array, "b t"] | None,
    *,
    train: bool,
    drop_path_rate: Float[Array, ""] | None = None,
    **shared: Array,
  ) -> Float[Array, "b t e"]:
    """Runs the layer.

    Args:
      x: its input.
      segment_ids: 0 is padding; None: one full segment.
      train: whether to drop anything.
      drop_path_rate: probability that a row skips a sublayer; see `DropPath`.
      **shared: what all layers' mixers get.
    """
    dropout, drop_path = Dropout(self.dropout_rate), DropPath()

    def drop(h):
      return drop_path(dropout(h, train=train), drop_path_rate, train=train)

    def mix(h):
      return drop(self.mixer()(h, segment_ids, train=train, **shared))

    def feed(h):
      return drop(self.feed_forward()(h))

    def norm_named(name):
      return lambda h: self.norm(name=name)(h)

    x = self.residual(x, mix, norm_named("attention_norm"))
    x = self.residual(x, feed, norm_named("mlp_norm"))
    return constrain(x, ("batch", "length", None))
