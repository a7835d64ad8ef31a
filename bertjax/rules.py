"""Regex lists that select parameters: decay, freezing, rates, sharding."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax

from bertjax.expressions import regex


def path_name(path: Sequence[Any]) -> str:
  """Key path of a pytree leaf as `encoder/layers/attention/query/kernel`."""
  return jax.tree_util.keystr(tuple(path), simple=True, separator="/")


def names(tree: Any) -> Any:
  """A tree of the same structure holding each leaf's path name."""
  return jax.tree_util.tree_map_with_path(lambda path, _: path_name(path), tree)


def match(rules: Iterable[tuple[str, Any]], tree: Any, field: str) -> Any:
  """For each leaf of `tree`, the value of the first rule that matches.

  A pattern matches when `re.search` finds it in the leaf's path name.

  Args:
    rules: `[(pattern, value), ...]`, first match wins.
    tree: parameters or any tree with the same paths.
    field: the config field that holds the rules, for messages.

  Raises:
    ValueError: a leaf that no rule matches, or a rule that matches no leaf
      (most often a typo, so it is refused rather than ignored), or a pattern
      that is no expression. The catch-all patterns `.*` and `` may go unused.
  """
  rules = [(regex(pattern, field), value) for pattern, value in rules]
  used = set()

  def first(path, _):
    name = path_name(path)
    for i, (pattern, value) in enumerate(rules):
      if pattern.search(name):
        used.add(i)
        return value
    raise ValueError(
      f"{field}: no rule matches parameter {name!r}; add one, or a final"
      " ('.*', value)."
    )

  matched = jax.tree_util.tree_map_with_path(first, tree)
  for i, (pattern, _) in enumerate(rules):
    if i not in used and pattern.pattern not in (".*", ""):
      some = [
        path_name(p) for p, _ in jax.tree_util.tree_leaves_with_path(tree)
      ]
      raise ValueError(
        f"{field}: pattern {pattern.pattern!r} matches no parameter that an"
        f" earlier rule left; parameters look like {some[0]!r}."
      )
  return matched
