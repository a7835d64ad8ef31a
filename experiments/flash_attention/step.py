"""BERT-large's training step with one attention or another."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax

from bertjax.config import merge, settings, stage_configs
from bertjax.planning.step import StepFacts, lower_step
from configs import bert

VOCAB_SIZE = 30_522  # of the published models


@dataclasses.dataclass(frozen=True)
class StockAttend:
  """`Attend` by JAX's own TPU kernel, `pallas.ops.tpu.flash_attention`.

  It has neither dropout nor windows, blocks or ALiBi; a bias it would
  materialise.

  Attributes:
    tiles: (queries, keys) of a tile.
  """

  tiles: tuple[int, int] = (512, 512)
  layout = "bhtd"

  def __call__(
    self,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    segment_ids: jax.Array | None = None,
    causal: bool = False,
    dropout_rate: float = 0.0,
    dropout_seed: jax.Array | None = None,
    **options: Any,
  ) -> jax.Array:
    """Attention of arrays [b, h, t, d]; see `bertjax.layers.Attend`."""
    from jax.experimental.pallas.ops.tpu import flash_attention as stock

    del dropout_seed  # without dropout it has no meaning
    options |= {"dropout_rate": dropout_rate or None}
    given = [name for name, value in options.items() if value is not None]
    if given:
      raise ValueError(f"Stock flash attention has no {', '.join(given)}.")
    ids = None
    if segment_ids is not None:
      ids = stock.SegmentIds(segment_ids, segment_ids)
    rows, columns = self.tiles
    return stock.flash_attention(
      q,
      k,
      v,
      segment_ids=ids,
      causal=causal,
      sm_scale=q.shape[-1] ** -0.5,
      block_sizes=stock.BlockSizes(
        block_q=rows,
        block_k_major=columns,
        block_k=columns,
        block_b=1,
        block_q_major_dkv=rows,
        block_k_major_dkv=columns,
        block_k_dkv=columns,
        block_q_dkv=rows,
        block_k_major_dq=columns,
        block_k_dq=columns,
        block_q_dq=rows,
      ),
    )


def lower(
  devices: Sequence[Any],
  *,
  variant: str,
  attend: str,
  attention_dropout: float,
  batch_size: int,
  remat: str = "none",
) -> tuple[jax.stages.Lowered, StepFacts]:
  """A target of `bertjax.hardware.compile_for`: phase 2 of configs/bert.py.

  Args:
    devices: to compile for.
    variant: of the config.
    attend: of the model, or "stock".
    attention_dropout: rate on attention weights; all other dropout is the
      config's, 0.1.
    batch_size: rows of 512 tokens.
    remat: of the model.
  """
  stage = stage_configs(bert.get_config(variant))["phase2"]
  changes = {
    "data": {"batch_size": batch_size, "seq_len": 512},
    "model": {
      "attend": StockAttend() if attend == "stock" else attend,
      "attention_dropout_rate": attention_dropout,
      "remat": remat,
    },
    "init_from": None,
  }
  stage = settings(merge(stage, changes))
  return lower_step(devices, settings=stage, vocab_size=VOCAB_SIZE)
