"""Instance modes: how documents become rows. One name, one builder each."""

from collections.abc import Callable

from bertjax.data.instances.full_sentences import DocSentences, FullSentences
from bertjax.data.instances.packed import Packed
from bertjax.data.instances.pairs import NextSentence, SentenceOrder
from bertjax.data.instances.plan import (
  BlockIndex,
  InstanceMode,
  Plan,
  assemble,
)
from bertjax.data.instances.single_segment import SingleSegment

INSTANCES: dict[str, Callable[..., InstanceMode]] = {
  "single_segment": SingleSegment,
  "packed": Packed,
  "full_sentences": FullSentences,
  "doc_sentences": DocSentences,
  "nsp": NextSentence,
  "sop": SentenceOrder,
}

__all__ = ["INSTANCES", "BlockIndex", "InstanceMode", "Plan", "assemble"]
