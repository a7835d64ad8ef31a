"""What the values of a config's fields are: one table, one form of refusal.

`bertjax.config` and the builders refuse names that nobody knows; the table here
says of the values what would otherwise show only where they are used, as an
error of Python's or as a run that is not what its config says. What depends on
other fields, on devices or on data is for whoever knows those.
"""

import dataclasses
import math
import numbers
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any


@dataclasses.dataclass(frozen=True)
class Kind:
  """What a field takes.

  Attributes:
    what: after "must be".
    holds: whether a value is of this kind.
  """

  what: str
  holds: Callable[[Any], bool]

  def or_none(self) -> "Kind":
    """This kind of a field that None switches off or leaves open."""
    return Kind(f"{self.what} or None", lambda x: x is None or self.holds(x))


def _whole(value: Any) -> bool:
  return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _real(value: Any) -> bool:
  """Infinity counts, NaN does not."""
  real = isinstance(value, numbers.Real) and not isinstance(value, bool)
  return real and not math.isnan(value)


def _number(value: Any) -> bool:
  return _real(value) and math.isfinite(value)


def _listed(value: Any) -> bool:
  return isinstance(value, Sequence) and not isinstance(value, str)


def _factors(value: Any) -> bool:
  return _listed(value) and all(
    _listed(pair)
    and len(pair) == 2
    and isinstance(pair[0], str)
    and _number(pair[1])
    for pair in value
  )


def _interval(value: Any) -> bool:
  return _listed(value) and len(value) == 2 and all(map(_real, value))


INTEGER = Kind("an integer", _whole)
POSITIVE_INTEGER = Kind("a positive integer", lambda x: _whole(x) and x > 0)
COUNT = Kind("a non-negative integer", lambda x: _whole(x) and x >= 0)
SEED = Kind(
  f"an integer in 0..{2**32 - 1}", lambda x: _whole(x) and 0 <= x < 2**32
)
NUMBER = Kind("a number", _number)
POSITIVE = Kind("a positive number", lambda x: _number(x) and x > 0)
NON_NEGATIVE = Kind("a non-negative number", lambda x: _number(x) and x >= 0)
STRING = Kind("a string", lambda x: isinstance(x, str))
STRINGS = Kind(
  "a list of strings", lambda x: _listed(x) and all(map(STRING.holds, x))
)
PATH = Kind("a path", lambda x: isinstance(x, str | os.PathLike))
FACTORS = Kind("a list of pairs (regex, number)", _factors)
INTERVAL = Kind("a pair (lowest, highest) of numbers", _interval)
MAPPING = Kind("a mapping", lambda x: isinstance(x, Mapping))

# By path; * is any name. A field that is not there has a default, or is missed
# by its builder.
FIELDS: dict[str, Kind] = {
  "model": MAPPING,
  "model.num_layers": POSITIVE_INTEGER.or_none(),
  "model.emb_dim": POSITIVE_INTEGER.or_none(),
  "model.num_heads": POSITIVE_INTEGER.or_none(),
  "model.mlp_dim": POSITIVE_INTEGER.or_none(),
  "objective": MAPPING,
  "data": MAPPING,
  "data.source": MAPPING,
  "data.instances": MAPPING,
  "data.masking": MAPPING.or_none(),
  "data.task": MAPPING,
  "data.files": MAPPING,
  "data.batch_size": POSITIVE_INTEGER,
  "data.seq_len": POSITIVE_INTEGER,
  "data.max_examples": POSITIVE_INTEGER.or_none(),
  "optim": MAPPING,
  "optim.learning_rate": POSITIVE,
  "optim.schedule": MAPPING,
  "optim.weight_decay": NON_NEGATIVE,
  "optim.clip_norm": POSITIVE.or_none(),
  "optim.lr_multipliers": FACTORS,
  "optim.layerwise_decay": POSITIVE.or_none(),
  "optim.freeze_lowest": COUNT.or_none(),
  "optim.b1": NON_NEGATIVE,
  "optim.b2": NON_NEGATIVE,
  "optim.momentum": NON_NEGATIVE.or_none(),
  "optim.eps": NON_NEGATIVE,
  "optim.freeze_threshold": POSITIVE,
  "optim.freeze_interval": POSITIVE_INTEGER.or_none(),
  "optim.trust_clip": INTERVAL.or_none(),
  "optim.phi_clip": INTERVAL.or_none(),
  "optim.factor_clip": INTERVAL,
  "optim.loss_scale": MAPPING.or_none(),
  "optim.precondition": MAPPING.or_none(),
  "optim.precondition.damping": POSITIVE,
  "optim.precondition.decay": NON_NEGATIVE,
  "optim.precondition.inverse_interval": POSITIVE_INTEGER,
  "optim.precondition.grad_worker_fraction": NON_NEGATIVE.or_none(),
  "optim.precondition.rank": POSITIVE_INTEGER,
  "optim.precondition.svd_groups": POSITIVE_INTEGER.or_none(),
  "optim.precondition.threshold": NUMBER,
  "optim.precondition.keep": NUMBER,
  "optim.precondition.clip": POSITIVE,
  "optim.precondition.max_width": POSITIVE_INTEGER.or_none(),
  "optim.precondition.block_width": POSITIVE_INTEGER.or_none(),
  "optim.precondition.kl_clip": POSITIVE,
  "optim.precondition.switch": MAPPING.or_none(),
  "optim.precondition.switch.threshold": NUMBER.or_none(),
  "optim.precondition.switch.decay": NUMBER,
  "stop": MAPPING,
  "stop.steps": POSITIVE_INTEGER.or_none(),
  "stop.epochs": POSITIVE.or_none(),
  "stop.tokens": POSITIVE.or_none(),
  "stop.wall_clock_s": POSITIVE.or_none(),
  "stop.target": MAPPING.or_none(),
  "stop.target.metric": STRING,
  "stop.target.value": NUMBER,
  "stop.early": MAPPING.or_none(),
  "stop.early.metric": STRING,
  "stop.early.patience": POSITIVE_INTEGER,
  "stop.early.min_delta": NON_NEGATIVE,
  "horizon": POSITIVE_INTEGER.or_none(),
  "seed": SEED,
  "seeds": MAPPING,
  "seeds.*": SEED.or_none(),
  "dtype": STRING,
  "prng": STRING,
  "mesh": MAPPING,
  "mesh.*": INTEGER,
  "microbatches": POSITIVE_INTEGER,
  "evals": MAPPING,
  "evals.*": MAPPING,
  "evals.*.every": COUNT.or_none(),
  "evals.*.every_epochs": POSITIVE.or_none(),
  "evals.*.batch_size": POSITIVE_INTEGER.or_none(),
  "evals.*.num_batches": POSITIVE_INTEGER.or_none(),
  "evals.*.num_rows": POSITIVE_INTEGER,
  "evals.*.views": POSITIVE_INTEGER,
  "evals.*.data": MAPPING.or_none(),
  "every": MAPPING,
  "every.*": POSITIVE_INTEGER,
  "keep": MAPPING,
  "keep.keep": POSITIVE_INTEGER,
  "keep.keep_every": POSITIVE_INTEGER.or_none(),
  "keep.best_metric": STRING.or_none(),
  "init_from": MAPPING.or_none(),
  "init_from.path": PATH,
  "profile": MAPPING.or_none(),
  "profile.*": COUNT,
  "writers": STRINGS,
  "samples": STRINGS,
  "reference_curve": PATH.or_none(),
  "cache_dir": PATH.or_none(),
  "stages": MAPPING.or_none(),
  "stages.*": MAPPING,
  "grid": MAPPING.or_none(),
}


def check(config: Mapping[str, Any]) -> None:
  """Refuses what is not of its field's kind.

  Args:
    config: plain values; a builder of one group checks `{"optim": spec}`.

  Raises:
    ValueError: names the field, its value and the kind.
  """
  for path, kind in FIELDS.items():
    for field, value in _found(config, path.split(".")):
      if not kind.holds(value):
        raise ValueError(f"{field}={value!r} must be {kind.what}.")


def _found(
  value: Any, keys: Sequence[str], field: str = ""
) -> Iterator[tuple[str, Any]]:
  """Field and value of everything that a path leads to."""
  if not keys:
    yield field, value
  elif isinstance(value, Mapping):  # or there is nothing below
    first, *rest = keys
    for key in value if first == "*" else {first} & value.keys():
      yield from _found(value[key], rest, f"{field}.{key}" if field else key)
