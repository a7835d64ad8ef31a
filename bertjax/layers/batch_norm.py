"""BatchNorm over the global batch, whose averages may follow a schedule."""

import contextlib
import contextvars
from collections.abc import Iterator

import flax.linen as nn
import jax
from flax.typing import Dtype

from bertjax.parallel.sharding import split_by_hand

NEW_SHARE = 0.1  # of a batch in the averages, after it was seen

_share: contextvars.ContextVar[float | jax.Array] = contextvars.ContextVar(
  "new_share", default=NEW_SHARE
)


@contextlib.contextmanager
def averaging(new_share: float | jax.Array) -> Iterator[None]:
  """Lets averages take another share of every batch.

  What PyTorch calls the momentum of BatchNorm; Flax's is the rest of 1.

  Args:
    new_share: for all norms that are applied within; a scalar that may be
      traced, such as a schedule of the training step.
  """
  token = _share.set(new_share)
  try:
    yield
  finally:
    _share.reset(token)


def batch_norm(train: bool, name: str, dtype: Dtype) -> nn.BatchNorm:
  """Over all axes but the last; averages keep 0.9, or see `averaging`.

  The batch is the global one also where the step is split by hand, as for
  compressed averages; of an accumulated batch it is the microbatch.

  Args:
    train: use the batch's statistics and update the averages.
    name: of the module.
    dtype: of the result; statistics are float32.
  """
  return nn.BatchNorm(
    use_running_average=not train,
    momentum=1 - _share.get(),
    epsilon=1e-5,
    dtype=dtype,
    axis_name="data" if split_by_hand("data") else None,
    name=name,
  )
