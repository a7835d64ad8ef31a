"""What fine-tuning of Point-BERT has in common.

Yu et al. 2022, arXiv:2111.14819, section 4.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
from jaxtyping import Array, Float

from bertjax.metrics import flops
from bertjax.models.point_bert import PointEncoder
from bertjax.objectives.base import BatchSpec

Batch = Mapping[str, Any]


class PointFineTuning(nn.Module):
  """An encoder of clouds with a head for one task.

  Attributes:
    encoder: what is trained.
    fresh: parts that may begin untrained when the encoder's weights come from
      elsewhere.
    reads: see `Objective`.
    independent_rows: see `Objective`.
  """

  encoder: PointEncoder
  fresh: ClassVar[tuple[str, ...]] = ("classifier",)
  reads: ClassVar[tuple[str, ...]] = ("points", "labels")
  independent_rows: ClassVar[bool] = False

  @property
  def least_points(self) -> int:
    """Of a cloud that this can be asked of."""
    return self.encoder.least_points

  def encode(self, batch: Batch) -> Float[Array, "b t e"]:
    """Final states of [CLS] and of patches."""
    return self.encoder(batch, train=False).hidden

  def outputs(self, batch: Batch) -> dict[str, jax.Array]:
    """All that the model says of clouds, for comparisons."""
    return {"hidden": self.encode(batch), "logits": self.logits(batch)}

  def row_flops(self, params: Any, batch: BatchSpec) -> float:
    """Of encoder and head."""
    del params
    row = {
      name: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype)
      for name, x in batch.items()
    }
    return flops.products(
      lambda row: self.init(jax.random.key(0), row, train=False), row
    )


def check_rates(**rates: float) -> None:
  """Raises ValueError for a rate of `config.objective` out of range."""
  for name, rate in rates.items():
    if not 0.0 <= rate < 1.0:
      raise ValueError(f"objective.{name}={rate} must lie in [0, 1).")
