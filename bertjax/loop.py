"""The one training loop; it knows neither BERT nor text."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from bertjax.hooks import Hook
from bertjax.objectives.base import Metrics


def fit(
  state: Any,
  batches: Iterator[Any],
  train_step: Callable[[Any, Any], tuple[Any, Metrics]],
  *,
  start: int,
  stop: Callable[[int], str | None],
  hooks: Sequence[Hook],
  log: Callable[[int, Metrics], None],
  save: Hook | None = None,
  amend: Callable[[int, Any], Any] = lambda step, state: state,
) -> tuple[Any, int, str]:
  """Steps from `start` until `stop` gives a reason.

  Hooks see the state before `next`, so a checkpoint's iterator is exact. The
  last state is for the caller to save, who may measure more of it first.

  Args:
    state: what `train_step` carries.
    batches: never-ending iterator.
    train_step: `(state, batch) -> (state, metrics)`.
    start: optimizer steps already taken.
    stop: asked with the steps taken; a reason ends the loop.
    hooks: called in order as `hook(step, state)`.
    log: called with each step's index and metrics, still on the device.
    save: called as a hook once it is known that there is another step.
    amend: `(step, state) -> state`, before `save`, once it is known that there
      is another step: what was asked of the run from outside.

  Returns:
    The state, the steps taken, and why it stopped.
  """
  step = start
  while True:
    for hook in hooks:
      hook(step, state)
    if reason := stop(step):
      return state, step, reason
    state = amend(step, state)
    if save is not None:
      save(step, state)
    state, metrics = train_step(state, next(batches))
    log(step, metrics)
    step += 1
