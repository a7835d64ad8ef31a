"""BERT's training step with or without each of the measures that speed it up.

A config option switches most of them. What has no option, because nobody would
want the plain form, is replaced by the plain form while the step is traced.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from bertjax import reuse, train_step
from bertjax.config import merge, settings, stage_configs
from bertjax.layers import dropout, feed_forward, linear, norm
from bertjax.optim import by_layer
from bertjax.planning.step import StepFacts, lower_step
from configs import bert

# Label slots of a row, as Devlin et al. have them.
MASKED = {512: 77, 128: 20}


def plain_layer_norm(
  x: jax.Array,
  scale: jax.Array,
  bias: jax.Array,
  epsilon: float,
  in_loop: bool = False,
) -> jax.Array:
  """`norm.layer_norm`, its gradient left to autodiff."""
  del in_loop
  x = x.astype(jnp.float32)
  mean = x.mean(-1, keepdims=True)
  variance = jnp.square(x - mean).mean(-1, keepdims=True)
  normed = (x - mean) * jax.lax.rsqrt(variance + epsilon)
  wide = (1,) * (x.ndim - 1) + scale.shape
  return normed * scale.reshape(wide) + bias.reshape(wide)


def _threefry_words(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  return jax.random.bits(key, shape, jnp.uint32)


def _as_is(x: Any, *rest: Any) -> Any:
  del rest
  return x


@dataclasses.dataclass(frozen=True)
class Measure:
  """One thing that makes the step faster or smaller.

  Attributes:
    without: changes of the config that undo it, given the row length.
    replaced: functions (module, name, plain form) that undo it.
    entries: of tables (table, changed entries) that undo it.
  """

  without: Callable[[int], Mapping[str, Any]] = lambda seq_len: {}
  replaced: Sequence[tuple[Any, str, Callable]] = ()
  entries: Sequence[tuple[dict, Mapping[str, Any]]] = ()


# In the order in which the waterfall takes them.
MEASURES: dict[str, Measure] = {
  "gather labels": Measure(
    lambda seq_len: {"data": {"masking": {"max_masked": seq_len}}}
  ),
  "flash attention": Measure(lambda _: {"model": {"attend": "reference"}}),
  "hardware generator": Measure(
    lambda _: {"prng": "threefry2x32"},
    replaced=[(dropout, "hashed_bits", _threefry_words)],
  ),
  "keep products": Measure(lambda _: {"model": {"remat": "full"}}),
  "epilogues": Measure(
    replaced=[
      (norm, "layer_norm", plain_layer_norm),
      (feed_forward, "finished", _as_is),
    ],
    entries=[(feed_forward.ACTIVATIONS, {"gelu_tanh": jax.nn.gelu})],
  ),
  "optimizer by layer": Measure(
    replaced=[(by_layer, "on_chip_bytes", lambda mesh: 0)]
  ),
  "cast in place": Measure(replaced=[(linear, "held", _as_is)]),
  "no zeros": Measure(entries=[(train_step.COMPILER_OPTIONS, {"tpu": {}})]),
  "unrolled": Measure(lambda _: {"model": {"scan": True}}),
}


def lower(
  devices: Sequence[Any],
  *,
  variant: str,
  batch_size: int,
  seq_len: int,
  without: Collection[str] = (),
  model: Mapping[str, Any] | None = None,
  vocab_size: int = 30_522,
) -> tuple[jax.stages.Lowered, StepFacts]:
  """A target of `bertjax.hardware.compile_for`: phase 2 of configs/bert.py.

  Args:
    devices: to compile for.
    variant: of the config.
    batch_size: rows.
    seq_len: their length.
    without: keys of `MEASURES` to leave out.
    model: further changes of the model.
    vocab_size: by default that of the published models.
  """
  stage = stage_configs(bert.get_config(variant))["phase2"]
  stage["optim"] = {"name": "lamb", "learning_rate": 1e-3}
  masking = {"max_masked": MASKED[seq_len]}
  changes = {
    "dtype": "bfloat16",
    "data": {"batch_size": batch_size, "seq_len": seq_len, "masking": masking},
    "model": {"scan": False} | dict(model or {}),
    "init_from": None,
  }
  stage = merge(stage, changes)
  with contextlib.ExitStack() as replaced:
    # What is traced with other functions in place is nobody else's.
    reuse.forget()
    replaced.callback(reuse.forget)
    for name in without:
      measure = MEASURES[name]
      stage = merge(stage, measure.without(seq_len))
      for module, function, plain in measure.replaced:
        replaced.enter_context(mock.patch.object(module, function, plain))
      for table, entries in measure.entries:
        replaced.enter_context(mock.patch.dict(table, entries))
    return lower_step(devices, settings=settings(stage), vocab_size=vocab_size)
