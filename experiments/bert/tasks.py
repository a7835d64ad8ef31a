"""The two downstream tasks: topics of sentences, packages of docstrings."""

import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bertjax.data.sources.grammar import Grammar
from bertjax.data.sources.package_docstrings import PackageDocstrings
from experiments import labelled


def topics(
  folder: pathlib.Path, grammar: Mapping[str, Any], documents: int
) -> labelled.LabelledTexts:
  """Which topic a generated sentence is about.

  Args:
    folder: where the task is kept.
    grammar: options of the corpus for pre-training; its lexicons are kept.
    documents: how many, each giving one sentence; none is in that corpus.
  """

  def records() -> Iterator[dict[str, str]]:
    options = {**grammar, "documents": {"labelled": documents}}
    for example in Grammar(**options).examples("labelled"):
      yield {
        "id": example["id"],
        "text": example["text"].split("\n")[0],
        "label": f"topic {example['topic']}",
      }

  return labelled.write(folder, records())


def docstrings(
  folder: pathlib.Path, packages: Sequence[str]
) -> labelled.LabelledTexts:
  """Which installed package a docstring is from."""

  def records() -> Iterator[dict[str, str]]:
    for example in PackageDocstrings(packages).examples("train"):
      yield {
        "id": example["id"],
        "text": example["text"],
        "label": example["package"],
      }

  return labelled.write(folder, records())
