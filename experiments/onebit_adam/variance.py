"""The curve that the automatic freezing rule watches, over a run of Adam."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bertjax import experiment, loop
from bertjax.config import settings
from bertjax.optim import freezing
from bertjax.optim.adamw import AdamState
from bertjax.parallel.sharding import put_batch
from experiments.measurements import Measurements, fingerprint

THRESHOLD = 0.96  # the paper's
_OPTIMIZER = pathlib.Path(freezing.__file__).with_name("adamw.py")


def watch(folder: pathlib.Path, config: Mapping[str, Any]) -> dict[str, Any]:
  """|v_old|_1 / |v|_1 over a run of AdamW, and where the rule would freeze.

  Args:
    folder: remembers the norms.
    config: of the run; v_old is 1 / (1 - b2) steps older.

  Returns:
    "steps" and "ratios", from the first step that has an old variance on, and
    "frozen", the steps of the rule's first phase; None if it never ends.
  """
  measured = Measurements(folder, fingerprint([_OPTIMIZER, __file__]))
  found = measured.get(norms, config=dict(config))
  return of_norms(found["norms"], found["rates"], config["optim"]["b2"])


def of_norms(
  values: Sequence[float], rates: Sequence[float], b2: float
) -> dict[str, Any]:
  """What `watch` returns, of |v|_1 after each step.

  Args:
    values: |v|_1.
    rates: learning rates, of one step more.
    b2: decay of v.
  """
  rule = freezing.build_rule(
    "auto",
    threshold=THRESHOLD,
    interval=None,
    b2=b2,
    total_steps=len(values),
    learning_rate=lambda step: jnp.asarray(rates)[step],
  )
  age = rule.interval
  return {
    "steps": list(range(age + 1, len(values) + 1)),
    "ratios": [old / new for old, new in zip(values, values[age:])],
    "frozen": _frozen(rule, values),
  }


def _frozen(rule: freezing.FreezeRule, values: Sequence[float]) -> int | None:
  """The rule itself, fed with norms instead of variances."""
  advance, state = jax.jit(rule.advance), rule.init()
  for step, value in enumerate(values, 1):
    state = advance(state, jnp.float32(value))
    if state.frozen:
      return step
  return None


def norms(*, config: Mapping[str, Any]) -> dict[str, list[float]]:
  """|v|_1 after, and the learning rate of, each step of a run of AdamW.

  The run is that of `bertjax.train` with this config, without evaluation.
  """
  built = experiment.build(settings(config))
  steps, found = built.settings.stop["steps"], []

  def look(step: int, state: Any) -> None:
    if step:
      found.append(_norm(state.opt_state))

  iterator = built.data.dataset().iterator(built.data.batch_size)
  try:
    loop.fit(
      built.init(),
      (put_batch(rows, built.mesh) for rows in iterator),
      built.step,
      start=0,
      stop=lambda step: "done" if step >= steps else None,
      hooks=[look],
      log=lambda step, metrics: None,
    )
  finally:
    iterator.close()
  # One more: the rule looks at the rate that comes next.
  rates = [float(built.optimizer.schedule(i)) for i in range(steps + 1)]
  return {"norms": [float(x) for x in found], "rates": rates}


@jax.jit
def _norm(opt_state: Any) -> jax.Array:
  is_adam = lambda x: isinstance(x, AdamState)  # noqa: E731
  nodes = filter(is_adam, jax.tree.leaves(opt_state, is_leaf=is_adam))
  (nu,) = [node.nu for node in nodes]
  return sum(jnp.sum(v) for v in jax.tree.leaves(nu))
