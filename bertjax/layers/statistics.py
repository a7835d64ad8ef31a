"""What an optimizer may ask about linear layers: inputs and output gradients.

An answer is the gradient of the loss by a *probe*: a variable of zeros beside
the layer's parameters whose cotangent is, by definition, the statistic. So the
answers come out of the backward pass, add up over microbatches as gradients do,
are stacked by `nn.scan` and are computed once under `nn.remat`; and a model
that nobody asks is the model of before.

With x the inputs of a layer and g the gradients of the loss by its outputs,
sums run over the tokens that a device of the batch axes holds. They have a
leading axis of such shards, so that an optimizer adds them when, and in the
precision that, it likes. Tokens are whatever the layer maps one by one: for a
convolution, which is a linear layer on patches, places.

| name | shape | |
|---|---|---|
| token_count | [shards, groups] | tokens |
| input_sum | [shards, groups, inputs] | sum of x |
| output_sum | [shards, groups, outputs] | sum of g: the bias gradient |
| input_square | [shards, groups] | sum of the squares of x |
| input_gram | [shards, inputs, inputs] | sum of x x^T |
| output_gram | [shards, outputs, outputs] | sum of g g^T |
| input_rows | [rows, inputs] | mean of x over the tokens of a row |
| output_rows | [rows, outputs] | sum of g over the tokens of a row |
"""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import flax.traverse_util
import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec
from jax.typing import ArrayLike

from bertjax.layers.linear import Linear
from bertjax.parallel.sharding import constrain, current_batch_shards

# The collections of probes: cotangents of the one are summed over microbatches,
# those of the other put side by side.
SUMS, ROWS = "probes", "row_probes"

Found = dict[str, dict[str, jax.Array]]


class LayerSize(NamedTuple):
  """A linear layer, or a stack of them.

  Attributes:
    stack: lengths of the leading axes that replicate it.
    inputs: width of its input, all summed axes together.
    outputs: width of its output.
  """

  stack: tuple[int, ...]
  inputs: int
  outputs: int


class _Sizes(NamedTuple):
  """What the shape of a statistic depends on."""

  shards: int
  groups: int
  rows: int
  inputs: int
  outputs: int


class _Statistic(NamedTuple):
  collection: str
  degree: int  # in g
  shape: Callable[[_Sizes], tuple[int, ...]]
  # (x [b, t, inputs], g [b, t, outputs], weights [b, t], sizes)
  compute: Callable[..., jax.Array]


def _sums(v: jax.Array, sizes: _Sizes) -> jax.Array:
  """[b, t, d] -> [shards, groups, d]."""
  v = v.astype(jnp.float32)
  return v.reshape(sizes.shards, sizes.groups, -1, v.shape[-1]).sum(2)


def _gram(v: jax.Array, sizes: _Sizes) -> jax.Array:
  """[b, t, d] -> [shards, d, d]."""
  v = v.reshape(sizes.shards, -1, v.shape[-1])
  return jnp.einsum("snd,sne->sde", v, v, preferred_element_type=jnp.float32)


def _row_means(x: jax.Array, weights: jax.Array) -> jax.Array:
  """[b, t, d] -> [b, d]."""
  count = jnp.maximum(weights.sum(1), 1.0)[:, None]
  return x.astype(jnp.float32).sum(1) / count


_STATISTICS: dict[str, _Statistic] = {
  "token_count": _Statistic(
    SUMS,
    0,
    lambda s: (s.shards, s.groups),
    lambda x, g, w, s: _sums(w[..., None], s)[..., 0],
  ),
  "input_sum": _Statistic(
    SUMS,
    0,
    lambda s: (s.shards, s.groups, s.inputs),
    lambda x, g, w, s: _sums(x, s),
  ),
  "output_sum": _Statistic(
    SUMS,
    1,
    lambda s: (s.shards, s.groups, s.outputs),
    lambda x, g, w, s: _sums(g, s),
  ),
  "input_square": _Statistic(
    SUMS,
    0,
    lambda s: (s.shards, s.groups),
    lambda x, g, w, s: _sums(
      jnp.square(x.astype(jnp.float32)).sum(-1, keepdims=True), s
    )[..., 0],
  ),
  "input_gram": _Statistic(
    SUMS,
    0,
    lambda s: (s.shards, s.inputs, s.inputs),
    lambda x, g, w, s: _gram(x, s),
  ),
  "output_gram": _Statistic(
    SUMS,
    2,
    lambda s: (s.shards, s.outputs, s.outputs),
    lambda x, g, w, s: _gram(g, s),
  ),
  "input_rows": _Statistic(
    ROWS,
    0,
    lambda s: (s.rows, s.inputs),
    lambda x, g, w, s: _row_means(x, w),
  ),
  "output_rows": _Statistic(
    ROWS,
    1,
    lambda s: (s.rows, s.outputs),
    lambda x, g, w, s: g.astype(jnp.float32).sum(1),
  ),
}
NAMES = tuple(_STATISTICS)


@dataclasses.dataclass(frozen=True)
class Wanted:
  """Which statistics of which layers.

  Attributes:
    layers: by path of a layer, its size.
    names: by path of a layer, rows of the table above.
    groups: parts that a shard's tokens are divided into, in their order.
    skip_padding: leave out tokens whose segment is 0, in layers that see all
      tokens of a row; their g is 0 in any case.
  """

  layers: Mapping[str, LayerSize]
  names: Mapping[str, tuple[str, ...]]
  groups: int = 1
  skip_padding: bool = False

  def probes(self, rows: int) -> dict[str, Any]:
    """Collections of zeros to differentiate by.

    Args:
      rows: of a microbatch, see `rows_of`.
    """
    found: dict[str, dict] = {}
    for path, names in self.names.items():
      stack, inputs, outputs = self.layers[path]
      sizes = _Sizes(current_batch_shards(), self.groups, rows, inputs, outputs)
      for name in names:
        row = _STATISTICS[name]
        zeros = jnp.zeros((*stack, *row.shape(sizes)), jnp.float32)
        found.setdefault(row.collection, {})[*path.split("/"), name] = zeros
    return {
      collection: flax.traverse_util.unflatten_dict(tree)
      for collection, tree in found.items()
    }

  def specs(self, axis: str) -> dict[str, Any]:
    """By collection, how gradients of several microbatches lie over a mesh.

    Where every shard of a mesh axis has differentiated by probes of its own:
    shards side by side in sums, rows in each microbatch.

    Args:
      axis: of the mesh.
    """
    found: dict[str, dict] = {SUMS: {}, ROWS: {}}
    for path, names in self.names.items():
      depth = len(self.layers[path].stack)
      for name in names:
        collection = _STATISTICS[name].collection
        before = depth + (collection == ROWS)
        spec = PartitionSpec(*(None,) * before, axis)
        found[collection][*path.split("/"), name] = spec
    return {
      collection: flax.traverse_util.unflatten_dict(tree)
      for collection, tree in found.items()
      if tree
    }

  def collect(self, gradients: Mapping[str, Any]) -> Found:
    """Statistics by path and name, from the gradient of a whole batch.

    Where "output_sum" was not asked for and a layer has a bias, its gradient is
    that: summed over all devices already, so the one shard's.

    Args:
      gradients: by collection, "params" among them; those by row probes have a
        leading axis of microbatches if there were several.
    """
    found: Found = {path: {} for path in self.names}
    for collection in (SUMS, ROWS):
      tree = flax.traverse_util.flatten_dict(gradients.get(collection, {}))
      for (*path, name), value in tree.items():
        stack = len(self.layers["/".join(path)].stack)
        if collection == ROWS and value.ndim > stack + 2:
          # Rows of all microbatches side by side.
          value = jnp.moveaxis(value, 0, stack)
          shape = value.shape
          value = value.reshape(*shape[:stack], -1, shape[-1])
        found["/".join(path)][name] = value
    params = flax.traverse_util.flatten_dict(gradients["params"], sep="/")
    for path, statistics in found.items():
      bias = params.get(f"{path}/bias")
      if bias is not None and self.groups == 1:
        stack = self.layers[path].stack
        statistics.setdefault("output_sum", bias.reshape(*stack, 1, 1, -1))
    return found


def divide_gradients(
  gradients: Mapping[str, Any], scale: jax.Array
) -> dict[str, Any]:
  """Of a loss that was multiplied by `scale`, those of the loss itself.

  A statistic is divided as often as it has g as a factor.

  Args:
    gradients: by collection.
    scale: of the loss.
  """

  def divided(path, leaf):
    statistic = path[0].key in (SUMS, ROWS)
    degree = _STATISTICS[path[-1].key].degree if statistic else 1
    return leaf / scale**degree if degree else leaf

  return dict(jax.tree_util.tree_map_with_path(divided, dict(gradients)))


def rows_of(batch: Mapping[str, ArrayLike]) -> int:
  """Rows that layers see: an example has several where it has choices."""
  if "tokens" in batch:
    return math.prod(batch["tokens"].shape[:-1])
  return next(iter(batch.values())).shape[0]


@contextlib.contextmanager
def capture(
  wanted: Wanted | None, batch: Mapping[str, ArrayLike]
) -> Iterator[None]:
  """Within it, linear layers with probes compute what `wanted` asks for.

  Args:
    wanted: None changes nothing.
    batch: that the model is applied to.
  """
  if wanted is None:
    yield
    return

  def tapped(call, args, kwargs, context):
    y = call(*args, **kwargs)
    module = context.module
    if not isinstance(module, Linear) or context.method_name != "__call__":
      return y
    variables = module.variables
    probes = {**variables.get(SUMS, {}), **variables.get(ROWS, {})}
    if not probes:
      return y
    weights = None
    _, kept, _ = _split(module.spec)
    if wanted.skip_padding and kept == ["b", "t"] and "segment_ids" in batch:
      ids = batch["segment_ids"]
      weights = (ids > 0).reshape(-1, ids.shape[-1]).astype(jnp.float32)
    return _tap((module.spec, wanted.groups), y, args[0], weights, probes)

  with nn.intercept_methods(tapped):
    yield


def linear_layers(init: Callable[[], Any]) -> dict[str, int]:
  """Linear layers by path: how many axes of the kernel are summed over.

  Axes that `nn.scan` stacks do not count.

  Args:
    init: calls a model once, such as its initialisation; it is only traced.
  """
  found: dict[str, int] = {}

  def record(call, args, kwargs, context):
    module = context.module
    if isinstance(module, Linear) and context.method_name == "__call__":
      inputs, _, _ = _split(module.spec)
      found["/".join(module.path)] = len(inputs)
    return call(*args, **kwargs)

  with nn.intercept_methods(record):
    jax.eval_shape(init)
  return found


def _split(spec: str) -> tuple[list[str], list[str], list[str]]:
  """Letters that a linear map sums over, keeps, and makes."""
  operands, out = spec.split("->")
  given, letters = operands.split(",")
  return (
    [c for c in letters if c not in out],
    [c for c in given if c not in letters],
    [c for c in letters if c in out],
  )


def _canonical(
  v: jax.Array, order: str, kept: list[str], last: list[str]
) -> jax.Array:
  """Axes in `order` -> [b, t, d]: the batch, all other kept ones, `last`."""
  v = v.transpose([order.index(c) for c in (*kept, *last)])
  return v.reshape(v.shape[0], -1, math.prod(v.shape[len(kept) :]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tap(
  asked: tuple[str, int],
  y: jax.Array,
  x: jax.Array,
  weights: jax.Array | None,
  probes: dict[str, jax.Array],
) -> jax.Array:
  """y; the cotangents of `probes` are the statistics that they are named for.

  Args:
    asked: einsum of the layer, groups.
    y: its output.
    x: its input.
    weights: [b, t], 0 where x does not count; None if all do.
    probes: by name of the statistic.
  """
  del asked, x, weights, probes
  return y


def _tap_forward(asked, y, x, weights, probes):
  return _tap(asked, y, x, weights, probes), (x, weights, probes)


def _tap_backward(asked, residuals, g):
  x, weights, probes = residuals
  spec, groups = asked
  inputs, kept, outputs = _split(spec)
  operands, out = spec.split("->")
  rows = _canonical(x, operands.split(",")[0], kept, inputs)
  slopes = _canonical(g, out, kept, outputs)
  if weights is None:
    weights = jnp.ones(rows.shape[:2], jnp.float32)
  else:
    rows = rows * weights[..., None].astype(rows.dtype)
  sizes = _Sizes(
    shards=current_batch_shards(),
    groups=groups,
    rows=rows.shape[0],
    inputs=rows.shape[-1],
    outputs=slopes.shape[-1],
  )
  tokens = rows.shape[0] * rows.shape[1]
  if tokens % (sizes.shards * groups):
    raise ValueError(
      f"the {tokens} tokens that layer {spec!r} sees do not divide into"
      f" {groups} groups on each of {sizes.shards} batch shards."
    )
  found = {}
  for name, probe in probes.items():
    value = _STATISTICS[name].compute(rows, slopes, weights, sizes)
    value = constrain(value, ("batch", *(None,) * (value.ndim - 1)))
    found[name] = value.astype(probe.dtype)
  return g, None, None, found


_tap.defvjp(_tap_forward, _tap_backward)
