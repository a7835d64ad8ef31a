"""The authors' files, by their names and shapes, are our published sizes."""

import collections
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.data.shapes.files import ShapeNetPart
from bertjax.interop import names, point_bert, point_bert_files
from bertjax.objectives.frozen import frozen_variables
from tests.interop import released_point_bert as released

TRUNK = dict(
  name="point_bert",
  patches=64,
  patch_size=32,
  num_layers=12,
  emb_dim=384,
  num_heads=6,
  mlp_dim=1536,
  patch_features=256,
  shrink=1,
)
TOKENIZER = dict(
  name="point_tokenizer",
  patches=64,
  patch_size=32,
  vocab_size=8192,
  features=256,
  shrink=1,
)


def read(kind):
  """What is read of a file of this kind that was saved by DataParallel."""
  tensors = released.state(kind)
  found = {f"module.{name}": x for name, x in tensors.items()}
  plain = point_bert.plain(found)
  with mock.patch.object(point_bert_files, "read_tensors", lambda _: plain):
    return point_bert_files.read(f"{kind}.pth")


def whole(tree):
  return {
    name: np.unique(x)
    for name, x in names.flatten(tree).items()
    if "/layers/" not in name
  }


class ReleasedTest(parameterized.TestCase):
  @parameterized.parameters(
    ("tokenizer", TOKENIZER, dict(name="point_reconstruction")),
    ("classifier", TRUNK, dict(name="point_classification", num_classes=40)),
    (
      "segmenter",
      TRUNK | dict(patches=128),
      dict(
        name="part_segmentation",
        class_parts=ShapeNetPart.class_parts,
        labels=ShapeNetPart.classes,
      ),
    ),
    (
      "pretrained",
      TRUNK,
      dict(
        name="masked_points",
        tokenizer=TOKENIZER,
        contrast_dim=512,
        queue_size=16_384,
      ),
    ),
  )
  def test_files_say_what_they_hold(self, kind, model, objective):
    found = read(kind)
    self.assertEqual(found.spec, model)
    self.assertEqual(found.objective, objective)
    kept = [n for n in released.SHAPES[kind] if "num_batches" not in n]
    if kind == "pretrained":
      kept = [n for n in kept if n.startswith(("transformer_q.", "dvae."))]
    # Each number is where it was, as often as it was.
    counts = collections.Counter()
    for leaf in jax.tree.leaves((found.params, found.extra)):
      counts.update(dict(zip(*np.unique(leaf, return_counts=True))))
    state = released.state(kind)
    self.assertEqual(counts, {float(state[n].flat[0]): state[n].size
                              for n in kept})  # fmt: skip
    # No tensor of ours is of two of theirs, but stacked layers.
    for name, values in whole(found.params).items():
      self.assertLen(values, 1, name)
    if kind == "pretrained":
      (teacher,) = frozen_variables(found.extra).values()
      alone = read("tokenizer")
      self.assertEqual(
        jax.tree.map(np.shape, teacher["params"]),
        jax.tree.map(np.shape, alone.params["encoder"]),
      )


if __name__ == "__main__":
  absltest.main()
