"""Kinds of tasks: from records to rows, from logits to scores and answers."""

from bertjax.tasks.kinds.base import Features, Field, Kind, Record
from bertjax.tasks.kinds.choices import Choices
from bertjax.tasks.kinds.questions import Questions
from bertjax.tasks.kinds.sentences import Sentences
from bertjax.tasks.kinds.tagging import Tagging

__all__ = [
  "Choices",
  "Features",
  "Field",
  "Kind",
  "Questions",
  "Record",
  "Sentences",
  "Tagging",
]
