"""A linear map over named axes, with logical axis names for sharding."""

import math
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype

from bertjax.layers.matmul import einsum, held
from bertjax.parallel.sharding import parts

# "normal truncated at two std with std 0.02": the real deviation is 0.0176.
bert_init = nn.initializers.truncated_normal(0.02)


def _affine(
  spec: str,
  x: jax.Array,
  kernel: jax.Array,
  bias: jax.Array | None,
  dtype: Dtype,
  exchanged: str,
) -> jax.Array:
  """`einsum(spec, x, kernel) + bias`; by a two-dimensional kernel if it can.

  XLA's CPU backend copies a kernel of three dimensions before every product,
  and that for TPUs runs after it, not within, what a reshape parts from it.
  Letters of the kernel that another array does not keep together, as "h" and
  "d" in "bhtd", leave it as it is.
  """
  inputs, out = spec.split("->")
  given, letters = inputs.split(",")
  summed = "".join(c for c in letters if c not in out)
  made = letters.removeprefix(summed)
  if summed not in given or made not in out:
    y = einsum(spec, x, kernel, dtype, exchanged)
    return _add_bias(y, bias, out, made).astype(dtype)
  start = given.index(summed)
  width = math.prod(kernel.shape[: len(summed)])
  rest = x.shape[start + len(summed) :]
  flat = out.replace(made, "y")
  if flat.endswith("y"):
    matrix, order = kernel.reshape(width, -1), "xy"
  else:
    # The kernel's gradient is then made of arrays as they are; the other way
    # round a TPU would transpose x for it.
    turned = (*range(len(summed), kernel.ndim), *range(len(summed)))
    matrix, order = kernel.transpose(turned).reshape(-1, width), "yx"
  y = einsum(
    f"{given.replace(summed, 'x')},{order}->{flat}",
    x.reshape(*x.shape[:start], width, *rest),
    matrix,
    dtype,
    "".join(
      flattened
      for flattened, merged in (("x", summed), ("y", made))
      if set(merged).intersection(exchanged)
    ),
  )
  if bias is not None:
    bias = bias.reshape(-1)
  y = _add_bias(y, bias, flat, "y").astype(dtype)
  start = out.index(made)
  shape = kernel.shape[len(summed) :]
  return y.reshape(*y.shape[:start], *shape, *y.shape[start + 1 :])


def _add_bias(
  y: jax.Array, bias: jax.Array | None, letters: str, made: str
) -> jax.Array:
  """`y + bias`, whose axes are the letters `made` of those of y, in order."""
  if bias is None:
    return y
  return y + bias.reshape(
    [n if c in made else 1 for c, n in zip(letters, y.shape)]
  )


class Linear(nn.Module):
  """`y = einsum(spec, x, kernel) + bias`.

  Attributes:
    spec: einsum of input and kernel, such as "bte,ehd->bthd"; the bias
      follows the output's order.
    features: sizes of the kernel's letters that the input lacks, in order;
      the other sizes are the input's.
    axes: logical axis name of each kernel dimension.
    dtype: compute dtype; parameters are float32.
    use_bias: whether a bias over the kernel's output letters is added.
    kernel_init: initializer of the kernel; the bias starts at zero.
  """

  spec: str
  features: tuple[int, ...]
  axes: tuple[str | None, ...]
  dtype: Dtype = jnp.float32
  use_bias: bool = True
  kernel_init: Callable = bert_init

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    inputs, out = self.spec.split("->")
    given, letters = inputs.split(",")
    sizes = dict(zip(given, x.shape))
    sizes |= zip([c for c in letters if c not in given], self.features)
    shape = tuple(sizes[c] for c in letters)
    kernel = self.param(
      "kernel",
      nn.with_logical_partitioning(self.kernel_init, self.axes),
      shape,
      jnp.float32,
    )
    bias = None
    if self.use_bias:
      kept = [i for i, c in enumerate(letters) if c in out]
      bias = self.param(
        "bias",
        nn.with_logical_partitioning(
          nn.initializers.zeros, tuple(self.axes[i] for i in kept)
        ),
        tuple(shape[i] for i in kept),
        jnp.float32,
      )
      kernel = held(kernel, bias)
    split = parts(shape, self.axes)
    exchanged = "".join(c for c, axes in zip(letters, split) if "model" in axes)
    return _affine(self.spec, x, kernel, bias, self.dtype, exchanged)
