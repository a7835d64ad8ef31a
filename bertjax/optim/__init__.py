"""Optimizers: one table, one builder, everything an optax transformation.

`builder` says how a new one comes in.
"""

from bertjax.optim.adamw import adam, adamw, scale_by_adam
from bertjax.optim.builder import OPTIMIZERS, build_optimizer
from bertjax.optim.clip import clip_by_global_norm, clip_tree, global_norm
from bertjax.optim.freezing import freeze_now
from bertjax.optim.lamb import lamb
from bertjax.optim.lars import lars
from bertjax.optim.local import LocalGradientTransformation
from bertjax.optim.onebit_adam import (
  compressed_gradient_adam,
  onebit_adam,
  onebit_sgd,
)
from bertjax.optim.onebit_lamb import onebit_lamb
from bertjax.optim.optimizer import Optimizer
from bertjax.optim.preconditioning import (
  PRECONDITIONERS,
  CurvatureState,
  PreconditioningTransformation,
  curvature_metrics,
  switch_now,
)
from bertjax.optim.schedules import (
  SCHEDULES,
  Schedule,
  build_schedule,
  square_root_scaling,
)
from bertjax.optim.state import (
  adapt,
  gradient_norm,
  hand_over,
  schedule_step,
  state_shardings,
)
from bertjax.optim.trust_ratio import layer_statistics, scale_by_trust_ratio
from bertjax.optim.zero_one_adam import zero_one_adam

__all__ = [
  "OPTIMIZERS",
  "PRECONDITIONERS",
  "SCHEDULES",
  "CurvatureState",
  "LocalGradientTransformation",
  "Optimizer",
  "PreconditioningTransformation",
  "Schedule",
  "adam",
  "adamw",
  "adapt",
  "build_optimizer",
  "build_schedule",
  "clip_by_global_norm",
  "clip_tree",
  "compressed_gradient_adam",
  "curvature_metrics",
  "freeze_now",
  "global_norm",
  "gradient_norm",
  "hand_over",
  "lamb",
  "lars",
  "layer_statistics",
  "onebit_adam",
  "onebit_lamb",
  "onebit_sgd",
  "scale_by_adam",
  "scale_by_trust_ratio",
  "schedule_step",
  "square_root_scaling",
  "state_shardings",
  "switch_now",
  "zero_one_adam",
]
