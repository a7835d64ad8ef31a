"""Starts the upper layers of a pre-trained model afresh.

Reference: Zhang et al. 2020, "Revisiting few-sample BERT fine-tuning",
arXiv:2006.05987, section 5: the top layers are specialised in pre-training.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from bertjax import rules
from bertjax.optim import rates, selection


def reinitialise(
  params: Any,
  fresh: Any,
  *,
  stacked_axes: selection.AxesFn,
  top_k: int = 0,
  parameters: Sequence[str] = (),
) -> Any:
  """`params` with some values from `fresh`.

  Args:
    params: of a pre-trained model.
    fresh: a tree of the same shapes, newly initialised.
    stacked_axes: (name, leaf) -> axis of a scanned stack.
    top_k: how many of the highest layers start afresh.
    parameters: regexes of further parameters, such as "^pooler/".

  Raises:
    ValueError: more layers than there are, or a regex that matches nothing.
  """
  chosen = selection.resolve(parameters, params, "init_from.reinit.parameters")
  depths = rates.layer_depths(params, stacked_axes) if top_k else {}
  most = min((depth.num_layers for depth in depths.values()), default=0)
  if isinstance(top_k, bool) or not 0 <= top_k <= most:
    raise ValueError(
      f"init_from.reinit.top_k={top_k} must lie between 0 and the {most} layers"
      " of the model."
    )

  def replaced(path, old, new):
    name = rules.path_name(path)
    if chosen(name, old):
      return new
    if name not in depths:
      return old
    depth = depths[name]
    return jnp.where(depth.layer > depth.num_layers - top_k, new, old)

  return jax.tree_util.tree_map_with_path(replaced, params, fresh)
