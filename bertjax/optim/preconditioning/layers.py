"""Linear layers as matrices: what a second-order method sees of parameters."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from bertjax.layers.statistics import LayerSize
from bertjax.optim import selection


@dataclasses.dataclass(frozen=True)
class Layer:
  """A linear layer y = W x + b, or a stack of them.

  Attributes:
    path: of its module; its parameters are `path/kernel` and `path/bias`.
    kernel: shape of the kernel: stack, inputs, outputs.
    stack: leading axes of the kernel that replicate the layer.
    summed: axes of inputs after them.
    bias: whether there is a bias that trains.
  """

  path: str
  kernel: tuple[int, ...]
  stack: int
  summed: int
  bias: bool

  @property
  def size(self) -> LayerSize:
    """Stack, width of the input, width of the output."""
    kept = self.stack + self.summed
    return LayerSize(
      self.kernel[: self.stack],
      math.prod(self.kernel[self.stack : kept]),
      math.prod(self.kernel[kept:]),
    )

  @property
  def columns(self) -> int:
    """Width of the homogeneous input: one more with a bias."""
    return self.size.inputs + int(self.bias)

  def matrix(self, tree: Mapping[str, Array]) -> Float[Array, "*stack o i"]:
    """[W, b] of a flat tree, float32: outputs by (homogeneous) inputs."""
    stack, inputs, outputs = self.size
    kernel = tree[f"{self.path}/kernel"].reshape(*stack, inputs, outputs)
    matrix = jnp.swapaxes(kernel, -1, -2).astype(jnp.float32)
    if not self.bias:
      return matrix
    bias = tree[f"{self.path}/bias"].reshape(*stack, outputs, 1)
    return jnp.concatenate([matrix, bias.astype(jnp.float32)], axis=-1)

  def parts(self, matrix: Float[Array, "*stack o i"]) -> dict[str, Array]:
    """The inverse of `matrix`."""
    stack, inputs, _ = self.size
    kernel = jnp.swapaxes(matrix[..., :inputs], -1, -2).reshape(self.kernel)
    found = {f"{self.path}/kernel": kernel}
    if self.bias:
      shape = (*stack, *self.kernel[self.stack + self.summed :])
      found[f"{self.path}/bias"] = matrix[..., inputs].reshape(shape)
    return found


def find_layers(
  params: Any,
  stacked: selection.AxesFn,
  summed_axes: Mapping[str, int] | None = None,
) -> tuple[Layer, ...]:
  """The linear layers of a parameter tree, in its order.

  A layer is `.../kernel` and, if it has one, `.../bias`, whose axes are the
  kernel's last.

  Args:
    params: parameters, possibly abstract; what is masked out is not there.
    stacked: (name, leaf) -> axes that replicate layers.
    summed_axes: by path, axes of the kernel that the layer sums over
      (`layers.statistics.linear_layers`); other kernels are left out. None
      takes all kernels and reads the axes off the biases; without a bias there
      must then be one of each.

  Raises:
    ValueError: the stacked axes are not the first, or nobody says which axes
      are inputs.
  """
  leaves = selection.by_name(params)
  found: list[Layer] = []
  for name, leaf in leaves.items():
    path, _, last = name.rpartition("/")
    if last != "kernel" or (
      summed_axes is not None and path not in summed_axes
    ):
      continue
    axes = tuple(stacked(name, leaf))
    if axes != tuple(range(len(axes))):
      raise ValueError(
        f"optim.precondition: the layers of {name!r} lie along axes {axes};"
        " they must be its first."
      )
    bias = leaves.get(f"{path}/bias")
    matrix_axes = len(leaf.shape) - len(axes)
    if summed_axes is not None:
      summed = summed_axes[path]
    elif bias is not None:
      summed = len(leaf.shape) - len(bias.shape)
    elif matrix_axes == 2:
      summed = 1
    else:
      raise ValueError(
        f"optim.precondition: {name!r} of shape {tuple(leaf.shape)} has no bias"
        " that tells inputs from outputs; pass summed_axes."
      )
    shape = tuple(leaf.shape)
    found.append(Layer(path, shape, len(axes), summed, bias is not None))
  return tuple(found)
