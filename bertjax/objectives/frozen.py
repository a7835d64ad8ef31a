"""Models that an objective asks but does not train.

Their variables are a collection of the objective's own, which the optimizer
never sees and nothing updates: they are part of every checkpoint, and a run
that goes on needs no other folder. `bertjax.teachers` puts them there when a
run starts.
"""

import inspect
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import flax.linen as nn
import jax

from bertjax import registry
from bertjax.models import MODELS

FROZEN = "frozen"
_VARIABLES = "variables"

# What an objective's builder takes for a frozen model: `path`, the folder that
# its variables come from when a run starts, and what `config.model` would say
# of it, which a config may leave to that folder.
FrozenSpec = Annotated[Mapping[str, Any], FROZEN]


def frozen_fields(builder: Callable[..., nn.Module]) -> tuple[str, ...]:
  """Arguments of an objective's builder that are frozen models."""
  parameters = inspect.signature(builder).parameters
  return tuple(n for n, p in parameters.items() if p.annotation is FrozenSpec)


def build_frozen(spec: FrozenSpec, field: str, **context: Any) -> nn.Module:
  """The model of a `FrozenSpec`.

  Args:
    spec: whose path plays no part.
    field: that holds it, for messages.
    **context: arguments that a config may not give.

  Raises:
    ValueError: unknown name or option.
  """
  options = {k: v for k, v in spec.items() if k != "path"}
  return registry.build(MODELS, options, field, **context)


class Frozen(nn.Module):
  """Another model, named by this module's own name.

  Attributes:
    make: makes it, without parameters.
  """

  make: Callable[[], nn.Module]

  @nn.compact
  def __call__(self, *args: Any, method: str, **options: Any) -> Any:
    """What a method of the model says, without gradient.

    What the method changes, such as averages of BatchNorm, is forgotten.
    """
    model = self.make().clone(parent=None, name=None)

    def initial():
      keys = {"params": self.make_rng("params")}
      return nn.meta.unbox(model.init(keys, *args, method=method, **options))

    variables = self.variable(FROZEN, _VARIABLES, initial).value
    found, _ = model.apply(
      variables,
      *args,
      method=method,
      mutable=[name for name in variables if name != "params"],
      **options,
    )
    return jax.lax.stop_gradient(found)


def frozen_variables(extra: Any) -> dict[str, Any]:
  """By name of the model, its collections.

  Args:
    extra: an objective's collections.
  """
  return {
    name: tree[_VARIABLES] for name, tree in extra.get(FROZEN, {}).items()
  }


def with_frozen(extra: Any, found: dict[str, Any]) -> dict[str, Any]:
  """`extra` with other variables for all frozen models."""
  return {
    **extra,
    FROZEN: {name: {_VARIABLES: tree} for name, tree in found.items()},
  }
