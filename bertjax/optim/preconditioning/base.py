"""What all second-order methods share: when they act, and on what.

    gradient [W, b] of each linear layer -> direction -> rescaled -> optimizer

Everything that is not a linear layer, or was opted out, passes unchanged.
"""

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import flax.traverse_util
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int

from bertjax.layers.statistics import Found, Wanted
from bertjax.optim import selection
from bertjax.optim.preconditioning import wire
from bertjax.optim.preconditioning.layers import Layer, find_layers
from bertjax.optim.preconditioning.switch import SwitchRule, SwitchState
from bertjax.rules import path_name

Statistics = Mapping[str, Array]
RESCALES = ("sum", "joint", "kl", "none")
# What the captured share is made of.
_CAPTURED = ("token_count", "input_sum", "input_square")


@runtime_checkable
class Method(Protocol):
  """Curvature of one layer; leading stack axes are batched over."""

  def wants(self, layer: Layer) -> tuple[str, ...]:
    """Names of statistics, rows of `layers.statistics`."""
    ...

  def init(self, layer: Layer) -> Any:
    """Factors before the first refresh: a named tuple of arrays."""
    ...

  def refresh(
    self,
    layer: Layer,
    factors: Any,
    statistics: Statistics,
    count: Int[Array, ""],
  ) -> Any:
    """New factors from the statistics of a batch, summed over its shards.

    Those of a layer that the loss does not reach are 0: a method that averages
    then keeps its factors.

    Args:
      layer: whose they are.
      factors: old ones.
      statistics: by name; vectors are means (see `wire.reduce`).
      count: steps before this one.
    """
    ...

  def direction(
    self, layer: Layer, factors: Any, gradient: Float[Array, "*stack o i"]
  ) -> Float[Array, "*stack o i"]:
    """The preconditioned gradient, float32."""
    ...


@runtime_checkable
class Joint(Protocol):
  """A method with a part that is done for all layers at once."""

  def refresh_jointly(
    self, factors: Mapping[str, Any], count: Int[Array, ""]
  ) -> dict[str, Any]:
    """New factors of all layers.

    Args:
      factors: by path, as `Method.refresh` left them at this step.
      count: steps before this one.
    """
    ...


@dataclasses.dataclass(frozen=True)
class Preconditioner:
  """A method, and when and how it acts on all layers.

  Attributes:
    method: what it does to a layer.
    interval: steps between two refreshes; None for none but those of warm-up,
      so that MKOR without any is the optimizer alone.
    warmup_steps: the first steps, which all refresh.
    rescale: what the direction D of a layer is multiplied by, G its gradient:
      "joint" |G| / |D|; "sum" the same with the norms of weight and bias added
      instead of joined; "kl" one factor for all layers, min(1, sqrt(kl_clip /
      (lr^2 sum D.G))); "none" 1.
    kl_clip: for "kl".
    wire_dtype: of vectors that devices add up.
    groups: of tokens, each with means of its own.
  """

  method: Method
  interval: int | None = 1
  warmup_steps: int = 0
  rescale: Literal["sum", "joint", "kl", "none"] = "joint"
  kl_clip: float = 1e-3
  wire_dtype: str = "float32"
  groups: int = 1

  def __post_init__(self):
    for field, least in (("interval", 1), ("warmup_steps", 0), ("groups", 1)):
      value = getattr(self, field)
      if field == "interval" and value is None:
        continue
      if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(
          f"optim.precondition.{field}={value!r} must be an int of at least"
          f" {least}."
        )
    if self.rescale not in RESCALES:
      raise ValueError(
        f"optim.precondition.rescale={self.rescale!r} is unknown; choose from"
        f" {', '.join(RESCALES)}."
      )
    if not self.kl_clip > 0:
      raise ValueError(
        f"optim.precondition.kl_clip={self.kl_clip} must be positive."
      )
    if self.wire_dtype not in wire.DTYPES:
      raise ValueError(
        f"optim.precondition.wire_dtype={self.wire_dtype!r} is unknown; choose"
        f" from {', '.join(wire.DTYPES)}."
      )


class CurvatureState(NamedTuple):
  """What a preconditioner keeps; a new phase starts it afresh.

  Attributes:
    count: steps.
    factors: nested as the parameters; in place of a layer's parameters its
      factors.
    fallbacks: layers whose last direction was not finite, so that their
      gradient took its place.
    switch: whether and when it gives up; None if it never does.
    captured: of the last refresh, the share of inputs' squares that their mean
      has, averaged over layers; None unless asked for.
  """

  count: Int[Array, ""]
  factors: Any
  fallbacks: Int[Array, ""]
  switch: SwitchState | None
  captured: Float[Array, ""] | None


def curvature_metrics(opt_state: Any) -> dict[str, Float[Array, ""]]:
  """What a preconditioner says of its last step, float32; {} without one.

  Returns:
    "curvature_fallbacks", layers whose direction was not finite; with a switch
    "second_order", 1 until it is thrown; if asked for "captured", see
    `CurvatureState`.
  """
  found: dict[str, Array] = {}
  for node in jax.tree.leaves(
    opt_state, is_leaf=lambda x: isinstance(x, CurvatureState)
  ):
    if isinstance(node, CurvatureState):
      found["curvature_fallbacks"] = node.fallbacks.astype(jnp.float32)
      if node.switch is not None:
        found["second_order"] = (~node.switch.on).astype(jnp.float32)
      if node.captured is not None:
        found["captured"] = node.captured
  return found


class PreconditioningTransformation(optax.GradientTransformationExtraArgs):
  """A transformation whose `update` takes `statistics=` of linear layers.

  Attributes:
    wanted: which of them; the train step collects those.
    compact_every: steps between two looks at whether the switch was thrown, so
      that factors can be given up; None without a switch.
  """

  wanted: Wanted
  compact_every: int | None

  def __new__(
    cls,
    init: Callable,
    update: Callable,
    wanted: Wanted,
    compact_every: int | None = None,
  ):
    made = super().__new__(cls, init, update)
    made.wanted = wanted
    made.compact_every = compact_every
    return made


def precondition(
  preconditioner: Preconditioner,
  params: Any,
  *,
  stacked: selection.AxesFn,
  learning_rate: optax.Schedule | float,
  summed_axes: Mapping[str, int] | None = None,
  first_order: selection.Rule = (),
  frozen: Collection[str] = (),
  skip_padding: bool = False,
  switch: SwitchRule | None = None,
  measure_captured: bool = False,
) -> PreconditioningTransformation:
  """Gradients of linear layers -> their directions.

  `update(grads, state, params, statistics=..., value=...)` takes the gradient
  of the whole batch, clipped or not, and statistics that are never clipped.
  The refresh precedes the direction of the same step.

  Args:
    preconditioner: what is done to them.
    params: parameters, possibly abstract.
    stacked: (name, leaf) -> axes that replicate layers.
    learning_rate: for `rescale="kl"`.
    summed_axes: see `layers.find_layers`.
    first_order: layers that pass unchanged: a rule on kernels.
    frozen: names of parameters that `update` is not given.
    skip_padding: statistics leave out padding.
    switch: when to give up; None for never.
    measure_captured: report |mean x|^2 / mean |x|^2 of layers' inputs: how good
      a proxy of their covariance the mean is.

  Raises:
    ValueError: an expression that matches nothing, or no layer is left.
  """
  excluded = selection.resolve(
    first_order, params, "optim.precondition.first_order"
  )

  def layers_of(tree) -> tuple[Layer, ...]:
    found = find_layers(tree, stacked, summed_axes)
    return tuple(x for x in found if not excluded(f"{x.path}/kernel", None))

  layers = layers_of(
    jax.tree_util.tree_map_with_path(
      lambda path, leaf: (
        optax.MaskedNode() if path_name(path) in frozen else leaf
      ),
      params,
    )
  )
  if not layers:
    raise ValueError(
      "optim.precondition has no linear layer to act on; it needs"
      " `.../kernel` parameters that optim.precondition.first_order and"
      " optim.freeze leave."
    )
  names = _CAPTURED if measure_captured else ()
  wanted = Wanted(
    layers={layer.path: layer.size for layer in layers},
    names={
      layer.path: tuple(
        dict.fromkeys((*preconditioner.method.wants(layer), *names))
      )
      for layer in layers
    },
    groups=preconditioner.groups,
    skip_padding=skip_padding,
  )
  algorithm = _Preconditioning(
    preconditioner, layers_of, wanted, learning_rate, switch, measure_captured
  )
  return PreconditioningTransformation(
    algorithm.init,
    algorithm.update,
    wanted,
    None if switch is None else switch.window,
  )


@dataclasses.dataclass(frozen=True)
class _Preconditioning:
  """The steps of `precondition`; layers are those of the tree at hand."""

  preconditioner: Preconditioner
  layers_of: Callable[[Any], tuple[Layer, ...]]
  wanted: Wanted
  learning_rate: optax.Schedule | float
  switch: SwitchRule | None
  measure_captured: bool

  def init(self, params: Any) -> CurvatureState:
    return CurvatureState(
      count=jnp.zeros((), jnp.int32),
      factors=self._factors(self.layers_of(params)),
      fallbacks=jnp.zeros((), jnp.int32),
      switch=None if self.switch is None else self.switch.init(),
      captured=jnp.zeros((), jnp.float32) if self.measure_captured else None,
    )

  def update(
    self,
    updates,
    state,
    params=None,
    *,
    statistics=None,
    value=None,
    **extra_args,
  ):
    del params, extra_args
    layers = self.layers_of(updates)
    _check(layers, self.wanted, statistics)
    grads = selection.by_name(updates)

    def second_order():
      new = self._refreshed(layers, state, statistics)
      moved, fallbacks = self._directed(layers, grads, new)
      return moved, new._replace(fallbacks=fallbacks)

    def first_order():
      return grads, state._replace(fallbacks=jnp.zeros((), jnp.int32))

    if self.switch is None:
      moved, new = second_order()
    elif self._released(layers, state.factors):
      moved, new = first_order()
    else:
      moved, new = jax.lax.cond(state.switch.on, first_order, second_order)
    if self.switch is not None:
      new = new._replace(switch=self.switch.advance(state.switch, value))
    new = new._replace(count=optax.safe_increment(state.count))
    moved = jax.tree.unflatten(
      jax.tree.structure(updates), list(moved.values())
    )
    return moved, new

  def _factors(self, layers: Sequence[Layer]) -> Any:
    method = self.preconditioner.method
    return _nested({layer.path: method.init(layer) for layer in layers})

  def _released(self, layers: Sequence[Layer], factors: Any) -> bool:
    """Whether factors were given up (see `memory`)."""
    whole = jax.eval_shape(lambda: self._factors(layers))
    shapes = [leaf.shape for leaf in jax.tree.leaves(factors)]
    return shapes != [leaf.shape for leaf in jax.tree.leaves(whole)]

  def _refreshed(
    self, layers: Sequence[Layer], state: CurvatureState, statistics: Found
  ) -> CurvatureState:
    """The state with new factors, if they are due."""
    method = self.preconditioner.method
    due = state.count < self.preconditioner.warmup_steps
    if self.preconditioner.interval is not None:
      due |= state.count % self.preconditioner.interval == 0

    def refresh(factors, captured):
      # Inside the branch: devices add up nothing at other steps.
      reduced = wire.reduce(
        {layer.path: statistics[layer.path] for layer in layers},
        self.wanted,
        self.preconditioner.wire_dtype,
      )
      if self.measure_captured:
        captured = _captured([reduced[layer.path] for layer in layers])
      old = _flat(factors, layers)
      new = {
        layer.path: method.refresh(
          layer, old[layer.path], reduced[layer.path], state.count
        )
        for layer in layers
      }
      if isinstance(method, Joint):
        new = method.refresh_jointly(new, state.count)
      return _nested(new), captured

    factors, captured = jax.lax.cond(
      due, refresh, lambda *old: old, state.factors, state.captured
    )
    return state._replace(factors=factors, captured=captured)

  def _directed(
    self,
    layers: Sequence[Layer],
    grads: Mapping[str, Array],
    state: CurvatureState,
  ) -> tuple[dict[str, Array], Int[Array, ""]]:
    """Gradients by name with those of layers replaced; fallbacks."""
    method = self.preconditioner.method
    factors = _flat(state.factors, layers)
    matrices = {layer.path: layer.matrix(grads) for layer in layers}
    directions, finite = {}, {}
    for layer in layers:
      path, matrix = layer.path, matrices[layer.path]
      found = method.direction(layer, factors[path], matrix)
      finite[path] = _finite(found * matrix)
      # Before there are scales: one of them may be of all layers.
      directions[path] = jnp.where(finite[path], found, matrix)
    rate = self.learning_rate
    if callable(rate):
      rate = rate(state.count)
    scales = _scales(self.preconditioner, layers, matrices, directions, rate)
    moved, fallbacks = dict(grads), jnp.zeros((), jnp.int32)
    for layer in layers:
      direction = scales[layer.path] * directions[layer.path]
      scaled = _finite(direction)
      fallbacks += jnp.sum(~(finite[layer.path] & scaled), dtype=jnp.int32)
      direction = jnp.where(scaled, direction, matrices[layer.path])
      for name, part in layer.parts(direction).items():
        moved[name] = part.astype(grads[name].dtype)
    return moved, fallbacks


def _nested(flat: dict[str, Any]) -> Any:
  return flax.traverse_util.unflatten_dict(flat, sep="/")


def _flat(factors: Any, layers: Sequence[Layer]) -> dict[str, Any]:
  """By path; factors are named tuples, which are no leaves."""
  found = {}
  for layer in layers:
    node = factors
    for key in layer.path.split("/"):
      node = node[key]
    found[layer.path] = node
  return found


def _finite(matrix: Array) -> Bool[Array, "*stack 1 1"]:
  """Whether a matrix can be added up to a number."""
  return jnp.isfinite(jnp.sum(matrix, axis=(-2, -1), keepdims=True))


def _captured(statistics: Sequence[Statistics]) -> Float[Array, ""]:
  """Mean over layers, and groups, of |mean x|^2 / mean |x|^2."""
  shares = []
  for found in statistics:
    square = found["input_square"]
    mean = jnp.sum(jnp.square(found["input_sum"]), axis=-1)
    shares.append((mean / jnp.where(square > 0, square, 1.0)).reshape(-1))
  return jnp.concatenate(shares).mean()


def _check(
  layers: Sequence[Layer], wanted: Wanted, statistics: Found | None
) -> None:
  if statistics is None:
    raise ValueError(
      "statistics is required: optim.precondition needs those of linear layers"
      " (`Optimizer.statistics`), which the train step collects."
    )
  for layer in layers:
    found = statistics.get(layer.path, {})
    for name in wanted.names[layer.path]:
      if name not in found:
        raise ValueError(
          f"statistics lack {name!r} of layer {layer.path!r}; is it a"
          " `layers.Linear` that the loss depends on? If not, list it in"
          " optim.precondition.first_order."
        )


def _scales(
  preconditioner: Preconditioner,
  layers: Sequence[Layer],
  matrices: Mapping[str, Array],
  directions: Mapping[str, Array],
  rate: Any,
) -> dict[str, Array]:
  """Factors of directions, which broadcast against them."""
  if preconditioner.rescale == "none":
    return {layer.path: jnp.float32(1.0) for layer in layers}
  if preconditioner.rescale == "kl":
    product = sum(
      jnp.sum(directions[layer.path] * matrices[layer.path]) for layer in layers
    )
    square = jnp.square(jnp.asarray(rate, jnp.float32))
    divergence = jnp.abs(product) * square
    usable = divergence > preconditioner.kl_clip
    factor = jnp.sqrt(
      preconditioner.kl_clip / jnp.where(usable, divergence, 1.0)
    )
    return dict.fromkeys(
      (layer.path for layer in layers), jnp.where(usable, factor, 1.0)
    )

  def norm(layer, matrix):
    if preconditioner.rescale == "joint" or not layer.bias:
      return jnp.linalg.norm(matrix, axis=(-2, -1), keepdims=True)
    parts = matrix[..., :-1], matrix[..., -1:]
    return sum(jnp.linalg.norm(x, axis=(-2, -1), keepdims=True) for x in parts)

  scales = {}
  for layer in layers:
    wanted = norm(layer, matrices[layer.path])
    # A gradient of zeros, as a frozen layer's, is no failure.
    scales[layer.path] = jnp.where(
      wanted > 0, wanted / norm(layer, directions[layer.path]), 1.0
    )
  return scales
