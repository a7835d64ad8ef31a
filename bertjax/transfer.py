"""Parameters of one model fitted to the tree of another."""

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bertjax import loading
from bertjax.adaptation import vocabulary
from bertjax.expressions import regex
from bertjax.interop import names, point_bert_files, published

# Further collections that belong to parameters, under the same names.
AVERAGES = "batch_stats"


def load_params_for(
  path: str | os.PathLike, target: Any, **options: Any
) -> Any:
  """Parameters alone; see `load_variables_for`."""
  return load_variables_for(path, {"params": target}, **options)["params"]


def load_variables_for(
  path: str | os.PathLike,
  target: Mapping[str, Any],
  *,
  fresh: Sequence[str] = (),
  renames: Sequence[tuple[str, str]] = (),
  allow_missing: Sequence[str] = (),
  ignore: Sequence[str] = (),
  step: int | None = None,
  extend: Callable[[str, np.ndarray], np.ndarray] | None = None,
) -> Any:
  """Parameters of a saved or published model, fitted to another model's tree.

  With them go the averages of BatchNorm, if the target has any.

  Args:
    path: what `load_model` reads.
    target: the other model's parameters ("params") and averages, or the shapes
      of these.
    fresh: parts of the target that stay without value where the saved model has
      none. With any, heads of the saved model that the target lacks are left.
    renames: `(regex, replacement)`, applied in order with `re.sub` to the names
      of the saved parameters (in our spelling, layers as the target has them);
      each must match a name that the ones before it leave.
    allow_missing: regexes of target parameters that may stay without value.
    ignore: regexes of saved parameters (after renaming) or of published tensors
      that are left out.
    step: which checkpoint of a workdir.
    extend: `(name, table) -> table` for those with a row for every piece, where
      both have one.

  Returns:
    Trees like those of `target` of numpy arrays; None where `fresh` or
    `allow_missing` applies.

  Raises:
    ValueError: a parameter of either side that nothing explains, another shape,
      or a pattern that matches nothing.
  """
  trees = {
    collection: names.flatten(target[collection])
    for collection in ("params", AVERAGES)
    if collection in target
  }
  # The leaves of a module have other names in either collection.
  wanted = {
    name: leaf for tree in trees.values() for name, leaf in tree.items()
  }
  # Published tensors that `ignore` names never become parameters of ours.
  unread = _published_only(path, ignore)
  saved = loading.read_model(
    path,
    step=step,
    scan=any(name.startswith("encoder/layers/") for name in wanted),
    ignore=unread,
  )
  theirs = names.flatten(saved.params)
  if AVERAGES in target:
    theirs |= names.flatten(saved.extra.get(AVERAGES, {}))
  have = _renamed(theirs, renames)
  names.refuse_unused(
    (p for p in ignore if p not in unread), have, "init_from.ignore"
  )
  names.refuse_unused(allow_missing, wanted, "init_from.allow_missing")
  left_out = names.matching(have, ignore)
  if fresh:
    others = set(names.HEADS) - set(target["params"])
    left_out |= {name for name in have if _part(name) in others}
    left_out |= set(names.PRETRAINING_ONLY) - set(wanted)
  have = {name: leaf for name, leaf in have.items() if name not in left_out}
  problems = _unexplained(have, wanted, fresh, allow_missing)
  if extend is not None:
    for name in set(vocabulary.TABLES) & set(have) & set(wanted):
      have[name] = extend(name, have[name])
  problems += _shape_problems(have, wanted, fresh)
  if problems:
    raise ValueError(
      f"{path} does not explain this model's parameters: "
      + "; ".join(problems)
      + "."
    )
  return {
    collection: names.nest({name: have.get(name) for name in tree})
    for collection, tree in trees.items()
  }


def _published_only(
  path: str | os.PathLike, ignore: Sequence[str]
) -> list[str]:
  """Those expressions that match published tensors; none for a workdir."""
  if loading.origin_of(path) == loading.WORKDIR:
    return []
  if loading.origin_of(path) == loading.POINT_BERT:
    theirs = sorted(point_bert_files.read_tensors(path))
  else:
    theirs = published.tensor_names(path)
  return sorted({p for p in ignore if names.matching(theirs, [p])})


def _renamed(
  params: Mapping[str, Any], renames: Sequence[tuple[str, str]]
) -> dict[str, np.ndarray]:
  renamed = list(params)
  for pattern, replacement in renames:
    compiled = regex(pattern, "init_from.renames")
    names.refuse_unused([pattern], renamed, "init_from.renames")
    renamed = [compiled.sub(replacement, name) for name in renamed]
  have: dict[str, np.ndarray] = {}
  for name, leaf in zip(renamed, params.values(), strict=True):
    if name in have:
      raise ValueError(f"init_from.renames maps two parameters to {name!r}.")
    have[name] = np.asarray(leaf)
  return have


def _part(name: str) -> str:
  """The encoder or the head that a parameter is of."""
  return name.split("/")[0]


def _unexplained(
  have: Mapping[str, np.ndarray],
  wanted: Mapping[str, Any],
  fresh: Sequence[str],
  allow_missing: Sequence[str],
) -> list[str]:
  """What only one side has, without leave."""
  problems = []
  may_lack = set(fresh) - {_part(name) for name in have}
  absent = {n for n in set(wanted) - set(have) if _part(n) not in may_lack}
  if missing := absent - names.matching(absent, allow_missing):
    problems.append(
      f"it lacks {names.listed(missing)} (init_from.allow_missing)"
    )
  if extra := set(have) - set(wanted):
    problems.append(
      f"this model has no {names.listed(extra)} (init_from.ignore or renames)"
    )
  return problems


def _shape_problems(
  have: Mapping[str, np.ndarray],
  wanted: Mapping[str, Any],
  fresh: Sequence[str],
) -> list[str]:
  problems = []
  for name in sorted(set(have) & set(wanted)):
    theirs, ours = tuple(have[name].shape), tuple(wanted[name].shape)
    if theirs == ours:
      continue
    same_width = theirs[1:] == ours[1:]
    if same_width and name in vocabulary.TABLES:
      if name == "mlm_head/bias" and problems:
        continue  # said already
      problems.append(
        f"its vocabulary has {theirs[0]} rows, this model's {ours[0]} (use its"
        " tokenizer: data.tokenizer = dict(name='folder', path=...); or let"
        " init_from.new_rows='subword_mean' add rows for new pieces)"
      )
    elif same_width and name == "encoder/embeddings/position/embedding":
      problems.append(
        f"its table of positions has {theirs[0]} rows, this model's {ours[0]}"
        " (model.max_positions, model.position_offset)"
      )
    else:
      part = _part(name)
      hint = f" (init_from.ignore=['^{part}/'] begins untrained)"
      problems.append(
        f"{name} is {theirs} there and {ours} here"
        + (hint if part in fresh else "")
      )
  return problems[:3]
