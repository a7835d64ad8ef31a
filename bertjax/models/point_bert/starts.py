"""Initial values of Point-BERT's Transformer.

Kernels are drawn from a normal of 0.02, which the authors truncate at one
hundred deviations, and biases are 0. So "pretraining" draws [CLS] and its
position, too; "classifier" has what the authors train from without any
pre-training: [CLS] at 0 and its position from N(0, 1). (Their kernels are
PyTorch's own there; ours are not.)
"""

from typing import NamedTuple

import flax.linen as nn
from flax.typing import Initializer

kernel_init = nn.initializers.normal(0.02)


class Start(NamedTuple):
  """Initializers.

  Attributes:
    cls: of [CLS].
    cls_position: of its position.
  """

  cls: Initializer
  cls_position: Initializer


STARTS: dict[str, Start] = {
  "pretraining": Start(kernel_init, kernel_init),
  "classifier": Start(nn.initializers.zeros, nn.initializers.normal(1.0)),
}
