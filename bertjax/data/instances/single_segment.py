"""One piece of one document per row: [CLS] x [SEP]."""

import dataclasses

import numpy as np

from bertjax.data.instances import plan as plan_lib


@dataclasses.dataclass(frozen=True)
class SingleSegment:
  """Cuts every document into windows of `seq_len - 2` tokens, one per row.

  Simple and padded: short documents leave their rows mostly empty (`packed`
  fills them). Every token of the corpus appears exactly once in an epoch, and
  all epochs have the same number of rows.

  Cost: vectorised, about 30 ns per row.
  """

  min_seq_len = 3
  min_documents = 1
  has_pairs = False
  needs_sources = False

  def plan(
    self,
    block: plan_lib.BlockIndex,
    seq_len: int,
    rng: np.random.Generator,
  ) -> plan_lib.Plan:
    del rng  # nothing is random but the order, which the dataset shuffles
    starts, lengths, _ = plan_lib.cut(
      block.document_offsets[:-1], block.document_lengths, seq_len - 2
    )
    return plan_lib.one_span_rows(starts, lengths)
