"""FlashAttention as the encoders' attention, split as the mesh is."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from bertjax.parallel.sharding import (
  RULES,
  first_row,
  platform,
  split_by_hand,
)
from kernels.flash_attention import Sharding, flash_attention, make_seed


def mesh_sharding() -> Sharding | None:
  """Over which axes of the context's mesh attention is split; None: no mesh.

  Axes that an enclosing `shard_map` has split already are left out.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return None
  rules = dict(RULES)

  def axes(name):
    listed = rules[name]
    listed = (listed,) if isinstance(listed, str) else listed
    return tuple(a for a in listed if a in mesh.auto_axes and mesh.shape[a] > 1)

  return Sharding(
    batch=axes("batch"),
    heads=axes("heads"),
    sequence=next(iter(axes("length")), None),
  )


# On two AVX-512 cores, float32 attention that keeps its weights for the
# backward pass takes 0.7 to 0.9 of the time of `blockwise`, which computes them
# again, at lengths 128 and 256 (384: about as long; 512: 1.2 and more), and as
# much on two that have AVX2 only. In bfloat16 `blockwise` is the faster one at
# every length.
DENSE_LENGTH = 256


@dataclasses.dataclass(frozen=True)
class FlashAttend:
  """`Attend` by a kernel; see `kernels.flash_attention.flash_attention`.

  Attributes:
    backend: name of one, or None: that of the platform compiled for, or on a
      CPU, short and in float32, dense attention: the faster one there.
    fixed_layout: see `layout`; None: what the platform's kernels read.
    dropout_generator: see `flash_attention`; "auto" is the platform's fastest.
    interpret: run Pallas kernels in the interpreter, for tests on a CPU.
  """

  backend: str | None = None
  fixed_layout: str | None = None
  dropout_generator: str = "auto"
  interpret: bool = False

  @property
  def layout(self) -> str:
    """Order of the axes of q, k, v and the output."""
    if self.fixed_layout is not None:
      return self.fixed_layout
    return "bhdt" if platform() == "tpu" else "bthd"

  def backend_for(self, q: jax.Array, k: jax.Array) -> str | None:
    """The backend of arrays laid out as `layout` says."""
    if self.backend is not None or platform() != "cpu":
      return self.backend
    axis = self.layout.index("t")
    short = max(q.shape[axis], k.shape[axis]) <= DENSE_LENGTH
    return "dense" if short and q.dtype == jnp.float32 else None

  def __call__(
    self, q: jax.Array, k: jax.Array, v: jax.Array, **options: Any
  ) -> jax.Array:
    """Attention of arrays laid out as `layout` says; options as `Attend`."""
    seed = options.get("dropout_seed")
    if seed is not None and split_by_hand("data"):
      rows = q.shape[self.layout.index("b")]
      options["dropout_seed"] = make_seed(seed, batch=first_row(rows))
    return flash_attention(
      q,
      k,
      v,
      **options,
      dropout_generator=self.dropout_generator,
      layout=self.layout,
      backend=self.backend_for(q, k),
      interpret=self.interpret,
      sharding=mesh_sharding(),
    )
