"""Second-order methods: a table of what can stand before any optimizer.

    optim = dict(name="lamb", learning_rate=..., precondition=dict(name="mkor"))

A new method is a file with a function `(*, ...)` that returns a
`Preconditioner`, and a row in `PRECONDITIONERS`.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import optax

from bertjax import registry
from bertjax.optim import durations, selection
from bertjax.optim.preconditioning.base import (
  CurvatureState,
  Preconditioner,
  PreconditioningTransformation,
  curvature_metrics,
  precondition,
)
from bertjax.optim.preconditioning.eva import eva
from bertjax.optim.preconditioning.hylo import hylo
from bertjax.optim.preconditioning.kfac import kfac
from bertjax.optim.preconditioning.mkor import mkor
from bertjax.optim.preconditioning.sngd import sngd
from bertjax.optim.preconditioning.switch import SwitchRule, switch_now

__all__ = [
  "PRECONDITIONERS",
  "CurvatureState",
  "Preconditioner",
  "PreconditioningTransformation",
  "build_preconditioning",
  "curvature_metrics",
  "eva",
  "hylo",
  "kfac",
  "mkor",
  "precondition",
  "sngd",
  "switch_now",
]

PRECONDITIONERS: dict[str, Callable[..., Preconditioner]] = {
  "eva": eva,
  "hylo": hylo,
  "kfac": kfac,
  "mkor": mkor,
  "sngd": sngd,
}
_FIELD = "optim.precondition"
_VOCABULARY = "vocab"  # as layers name it
# Options of all of them, arguments of `precondition`.
_COMMON = ("first_order", "skip_padding", "measure_captured")


def build_preconditioning(
  spec: Mapping[str, Any],
  *,
  params: Any,
  stacked: selection.AxesFn,
  learning_rate: optax.Schedule,
  total_steps: int,
  linear_layers: Callable[[], Mapping[str, int]] | None = None,
  logical_axes: Any = None,
  frozen: Collection[str] = (),
) -> PreconditioningTransformation:
  """What `optim.precondition` of a config describes.

  Args:
    spec: `name`, that row's options, and those of `precondition`:
      `first_order` (if left out, the layers that score a vocabulary: their
      kernel has a logical axis "vocab"; `()` for none), `skip_padding`,
      `measure_captured`, and `switch`, the fields of a `SwitchRule` whose
      `step` may be a fraction of the run. Embeddings are no linear layers, and
      neither is a decoder that is tied to them.
    params: parameters, possibly abstract.
    stacked: (name, leaf) -> axes that replicate layers.
    learning_rate: the schedule.
    total_steps: of the phase.
    linear_layers: see `build_optimizer`.
    logical_axes: see `build_optimizer`.
    frozen: names of parameters that do not train.

  Raises:
    ValueError: names the option that does not fit.
  """
  spec = dict(spec)
  common = {key: spec.pop(key) for key in _COMMON if key in spec}
  if logical_axes is not None:
    common.setdefault(
      "first_order", selection.with_logical_axis(logical_axes, _VOCABULARY)
    )
  switch = spec.pop("switch", None)
  if switch is not None:
    switch = dict(switch)
    if switch.get("step") is not None:
      switch["step"] = durations.steps_of(
        switch["step"], total_steps, f"{_FIELD}.switch.step"
      )
    switch = registry.call(SwitchRule, switch, f"{_FIELD}.switch")
  made = registry.build(PRECONDITIONERS, spec, _FIELD)
  return precondition(
    made,
    params,
    stacked=stacked,
    learning_rate=learning_rate,
    summed_axes=None if linear_layers is None else linear_layers(),
    switch=switch,
    frozen=frozen,
    **common,
  )
