"""The fields of an experiment's config, and how a config becomes them."""

import copy
import dataclasses
import json
import numbers
import operator
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import ml_collections

from bertjax import fields, registry

Spec = Mapping[str, Any]


def cache_path(given: str | None = None) -> pathlib.Path:
  """`given`, the environment's BERTJAX_CACHE, or a folder of the user's."""
  given = given or os.environ.get("BERTJAX_CACHE")
  return pathlib.Path(given or pathlib.Path.home() / ".cache" / "bertjax")


def _every() -> Spec:
  return {"log": 20, "checkpoint": 500}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Seeds:
  """`config.seeds`; None is `config.seed`.

  Attributes:
    init: of the parameters that begin untrained.
    data: of the order of documents, rows and pairs.
    masks: of which tokens are masked, and with what.
    dropout: of dropout and whatever else a step draws.
  """

  init: int | None = None
  data: int | None = None
  masks: int | None = None
  dropout: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
  """What a config may say; each sub-dict is the arguments of one builder.

  Attributes:
    model: name of `MODELS` and its options; without a name that of
      `init_from`, with these options.
    objective: name of `OBJECTIVES` and its options; tasks know theirs.
    data: name of `DATA`, by default "text", and its options; without a
      tokenizer that of `init_from`.
    optim: name of `OPTIMIZERS`, its options, `schedule`, `clip_norm`,
      `precondition`...
    stop: rules that end the run; `steps` or `epochs` is required.
    horizon: steps that the schedule is drawn for; `stop.steps` by default.
    seed: of everything random that `seeds` does not name.
    seeds: a seed of its own for any of the fields of `Seeds`, so that what
      spreads over seeds can be told apart (Dodge et al. 2020,
      arXiv:2002.06305).
    dtype: compute dtype, "float32", "bfloat16", or "float16" for GPUs that
      have no bfloat16 (T4, V100), with a scaled loss (`optim.loss_scale`);
      parameters and optimizer state are float32.
    prng: generator of dropout and whatever else steps draw: "threefry2x32"
      (dropout by a hash that it seeds) gives the same numbers on any mesh;
      "rbg" is the platform's own, cheapest on TPU and twice as dear on CPU;
      "auto" is the cheaper one. Initialisation is threefry's.
    mesh: arguments of `make_mesh`.
    microbatches: parts into which a batch is split for accumulation.
    evals: evaluators by any name: `name` of `EVALUATORS`, `every` (steps) or
      `every_epochs`, and options; without either only at the end. `data` has
      what differs from this config's in what is read, such as another source.
    every: steps between readings of the metrics (`log`) and between
      checkpoints (`checkpoint`).
    keep: arguments of `Checkpointer` about what stays.
    init_from: where parameters come from, see `bertjax.handover`; {} is nowhere
      (`--config.init_from={}` takes it from a config that has one).
    profile: `start` and `stop` step of a profiler trace.
    writers: where metrics go, besides the report.
    samples: texts with masks that the trained model fills in the report.
    reference_curve: CSV of (step, loss) that the report compares with.
    cache_dir: where vocabularies and token caches live; the environment's
      BERTJAX_CACHE, or a folder in the user's cache, by default.
    stages: runs by name, what each changes in this config; each starts from
      the one before, as its `init_from` says.
    grid: lists of alternatives; see `bertjax.grid`.
  """

  model: Spec = dataclasses.field(default_factory=dict)
  objective: Spec = dataclasses.field(default_factory=dict)
  data: Spec
  optim: Spec
  stop: Spec
  horizon: int | None = None
  seed: int = 0
  seeds: Spec = dataclasses.field(default_factory=dict)
  dtype: str = "float32"
  prng: str = "auto"
  mesh: Spec = dataclasses.field(default_factory=dict)
  microbatches: int = 1
  evals: Mapping[str, Spec] = dataclasses.field(default_factory=dict)
  every: Spec = dataclasses.field(default_factory=_every)
  keep: Spec = dataclasses.field(default_factory=dict)
  init_from: Spec | None = None
  profile: Spec | None = None
  writers: Sequence[str] = ("csv", "tensorboard")
  samples: Sequence[str] = ()
  reference_curve: str | None = None
  cache_dir: str | None = None
  stages: Mapping[str, Spec] = dataclasses.field(default_factory=dict)
  grid: Spec = dataclasses.field(default_factory=dict)

  def seed_of(self, what: str) -> int:
    """The seed of a field of `Seeds`."""
    given = getattr(registry.call(Seeds, self.seeds, "seeds"), what)
    return self.seed if given is None else given

  @property
  def cache_path(self) -> pathlib.Path:
    """`cache_dir`, or its default."""
    return cache_path(self.cache_dir)

  def to_json(self) -> dict[str, Any]:
    """Plain values, as a workdir's config.json and checkpoints hold them.

    Raises:
      ValueError: names a field that is none, such as a function.
    """
    values = dataclasses.asdict(self)
    try:
      return json.loads(json.dumps(values, default=operator.index))
    except TypeError as err:
      name, value = _first_not_plain(values)
      raise ValueError(
        f"{name}={value!r}: a config holds numbers, strings, lists and dicts,"
        " which a workdir can keep; give what takes a function to the library's"
        " own functions instead."
      ) from err


def _first_not_plain(value: Any, name: str = "") -> tuple[str, Any] | None:
  """Path and value of the first leaf that JSON does not know."""
  if isinstance(value, Mapping):
    inner = ((f"{name}.{k}" if name else str(k), v) for k, v in value.items())
  elif isinstance(value, list | tuple):
    inner = ((f"{name}[{i}]", v) for i, v in enumerate(value))
  else:
    plain_types = str | numbers.Integral | float | None
    return None if isinstance(value, plain_types) else (name, value)
  found = (_first_not_plain(v, path) for path, v in inner)
  return next(filter(None, found), None)


def new_config() -> ml_collections.ConfigDict:
  """What a config starts from: the optional groups of `Settings`, empty."""
  config = ml_collections.ConfigDict()
  for name in (
    "model", "seeds", "mesh", "evals", "every", "keep", "init_from", "profile",
    "grid",
  ):  # fmt: skip
    config[name] = {}
  return config


def plain(config: Any) -> dict[str, Any]:
  """A ConfigDict or mapping as nested dicts of plain values."""
  return config.to_dict() if hasattr(config, "to_dict") else dict(config)


def settings(config: Any) -> Settings:
  """Checks a config's top level, and of what kind values are.

  Raises:
    ValueError: an unknown or missing field, an unknown key of `every` or
      `seeds`, or a value that is none of its field's (`bertjax.fields`).
  """
  found = registry.call(Settings, plain(config), "")
  fields.check(vars(found))
  registry.call(Seeds, found.seeds, "seeds")
  for key in found.every:
    registry.lookup(_every(), key, "every")
  return dataclasses.replace(
    found,
    every=_every() | dict(found.every),
    init_from=found.init_from or None,
    profile=found.profile or None,
  )


def merge(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict:
  """`base` with nested `changes`; a sub-dict with a new `name` replaces."""
  result = copy.deepcopy(dict(base))
  for key, value in changes.items():
    old = result.get(key)
    both = isinstance(value, Mapping) and isinstance(old, Mapping)
    if both and value.get("name", old.get("name")) == old.get("name"):
      result[key] = merge(old, value)
    else:
      result[key] = copy.deepcopy(value)
  return result


def stage_configs(config: Any) -> dict[str, dict[str, Any]]:
  """The configs of a staged run in order; {"": config} for a plain one.

  A grid is no part of them: they are what its alternatives change.

  Raises:
    ValueError: stages that are no mappings.
  """
  base = plain(config)
  base.pop("grid", None)
  stages = base.pop("stages", None)
  fields.check({"stages": stages})
  if not stages:
    return {"": base}
  return {name: merge(base, changes) for name, changes in stages.items()}
