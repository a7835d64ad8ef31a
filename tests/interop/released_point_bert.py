"""Tensors of the authors' files by name and shape, as their classes make them.

Point-BERT's repository, models/dvae.py, models/Point_BERT.py and
segmentation/models/PointTransformer.py with the released configurations.
"""

from collections.abc import Iterator

import numpy as np

Shape = tuple[int, ...]
Named = Iterator[tuple[str, Shape]]

E, F, LAYERS, CODES = 384, 256, 12, 8192


def _linear(name: str, inputs: int, outputs: int, *axes: int) -> Named:
  yield f"{name}.weight", (outputs, inputs, *axes)
  yield f"{name}.bias", (outputs,)


def _norm(name: str, width: int) -> Named:
  yield f"{name}.weight", (width,)
  yield f"{name}.bias", (width,)


def _batch_norm(name: str, width: int) -> Named:
  yield from _norm(name, width)
  yield f"{name}.running_mean", (width,)
  yield f"{name}.running_var", (width,)
  yield f"{name}.num_batches_tracked", ()


def _patches(name: str) -> Named:
  yield from _linear(f"{name}.first_conv.0", 3, 128, 1)
  yield from _batch_norm(f"{name}.first_conv.1", 128)
  yield from _linear(f"{name}.first_conv.3", 128, 256, 1)
  yield from _linear(f"{name}.second_conv.0", 512, 512, 1)
  yield from _batch_norm(f"{name}.second_conv.1", 512)
  yield from _linear(f"{name}.second_conv.3", 512, F, 1)


def _trunk() -> Named:
  yield from _patches("encoder")
  yield from _linear("reduce_dim", F, E)
  yield "cls_token", (1, 1, E)
  yield "cls_pos", (1, 1, E)
  yield from _linear("pos_embed.0", 3, 128)
  yield from _linear("pos_embed.2", 128, E)
  for i in range(LAYERS):
    block = f"blocks.blocks.{i}"
    yield from _norm(f"{block}.norm1", E)
    yield from _norm(f"{block}.norm2", E)
    yield f"{block}.attn.qkv.weight", (3 * E, E)
    yield from _linear(f"{block}.attn.proj", E, E)
    yield from _linear(f"{block}.mlp.fc1", E, 4 * E)
    yield from _linear(f"{block}.mlp.fc2", 4 * E, E)
  yield from _norm("norm", E)


def _graph(name: str, outputs: int) -> Named:
  yield from _linear(f"{name}.input_trans", F, 128, 1)
  widths = ((256, 256), (512, 512), (1024, 512), (1024, 1024))
  for i, (inputs, width) in enumerate(widths, 1):
    yield f"{name}.layer{i}.0.weight", (width, inputs, 1, 1)
    yield from _norm(f"{name}.layer{i}.1", width)
  yield f"{name}.layer5.0.weight", (outputs, 2304, 1)
  yield from _norm(f"{name}.layer5.1", outputs)


def _tokenizer() -> Named:
  yield from _patches("encoder")
  yield from _graph("dgcnn_1", CODES)
  yield "codebook", (CODES, F)
  yield from _graph("dgcnn_2", F)
  yield from _linear("decoder.mlp.0", F, 1024)
  yield from _linear("decoder.mlp.2", 1024, 1024)
  yield from _linear("decoder.mlp.4", 1024, 3 * 8)
  yield from _linear("decoder.final_conv.0", F + 5, 512, 1)
  yield from _batch_norm("decoder.final_conv.1", 512)
  yield from _linear("decoder.final_conv.3", 512, 512, 1)
  yield from _batch_norm("decoder.final_conv.4", 512)
  yield from _linear("decoder.final_conv.6", 512, 3, 1)


def _masked() -> Named:
  yield "mask_token", (1, 1, E)
  yield from _trunk()
  yield from _linear("lm_head", E, CODES)
  yield from _linear("cls_head.0", E, 512)
  yield from _linear("cls_head.2", 512, 512)


def _pretrained() -> Named:
  for prefix in ("transformer_q", "transformer_k"):
    yield from ((f"{prefix}.{name}", shape) for name, shape in _masked())
  yield from ((f"dvae.{name}", shape) for name, shape in _tokenizer())
  yield "queue", (512, 16_384)
  yield "queue_ptr", (1,)


def _classifier() -> Named:
  yield from _trunk()
  yield from _linear("cls_head_finetune.0", 2 * E, 256)
  yield from _linear("cls_head_finetune.3", 256, 40)


def _segmenter() -> Named:
  yield from _trunk()
  for level, own in ((2, 3), (1, 3), (0, 19)):
    name = f"propagation_{level}"
    for i, (inputs, width) in enumerate(((E + own, 4 * E), (4 * E, E))):
      yield from _linear(f"{name}.mlp_convs.{i}", inputs, width, 1)
      yield from _batch_norm(f"{name}.mlp_bns.{i}", width)
  for level in (1, 2):
    for i, (inputs, width) in enumerate(((768, 512), (1024, 384)), 1):
      name = f"dgcnn_pro_{level}.layer{i}"
      yield f"{name}.0.weight", (width, inputs, 1, 1)
      yield from _norm(f"{name}.1", width)
  yield from _linear("conv1", E, 128, 1)
  yield from _batch_norm("bn1", 128)
  yield from _linear("conv2", 128, 50, 1)


SHAPES: dict[str, dict[str, Shape]] = {
  "tokenizer": dict(_tokenizer()),
  "pretrained": dict(_pretrained()),
  "classifier": dict(_classifier()),
  "segmenter": dict(_segmenter()),
}


def state(kind: str) -> dict[str, np.ndarray]:
  """Numbers under these names, each tensor one number in all its places."""
  return {
    name: np.broadcast_to(np.float32(i), shape)
    for i, (name, shape) in enumerate(SHAPES[kind].items())
  }
