"""The name map: both directions, old spellings, and what it refuses."""

import numpy as np
from absl.testing import absltest, parameterized

from bertjax import interop
from tests.interop import toy

SPEC = toy.spec()
SHAPES = interop.parameter_shapes(SPEC)


def read(tensors, table=interop.BERT, **options):
  return interop.from_published(
    tensors, table, SHAPES, num_layers=3, where="FILE", **options
  )


class NameMapTest(parameterized.TestCase):
  @parameterized.product(
    table=(interop.BERT, interop.TF1),
    scan=(True, False),
    heads=(("mlm_head", "pooler", "pair_head"), ("mlm_head",), ("pooler",), ()),
  )
  def test_ours_to_theirs_to_ours_keeps_every_bit(self, table, scan, heads):
    params = toy.params(SPEC, heads, scan)
    tensors = interop.to_published(params, table, num_layers=3)
    toy.assert_same_trees(params, read(tensors, table, scan=scan))

  def test_roberta_has_other_names_for_the_same_parameters(self):
    spec = toy.spec("roberta")
    params = toy.params(spec, ("mlm_head",))
    tensors = interop.to_published(params, interop.ROBERTA, num_layers=3)
    self.assertIn("lm_head.layer_norm.weight", tensors)
    self.assertIn("roberta.encoder.layer.2.output.dense.bias", tensors)
    again = interop.from_published(
      tensors, interop.ROBERTA, interop.parameter_shapes(spec), num_layers=3
    )
    toy.assert_same_trees(params, again)

  def test_torch_matrices_are_out_by_in_and_those_of_tf1_in_by_out(self):
    params = toy.params(SPEC, scan=False)
    layer = params["encoder"]["layers_1"]
    torch = toy.published(SPEC)
    tf1 = toy.published(SPEC, table=interop.TF1)
    up = "bert.encoder.layer.1.intermediate.dense"
    np.testing.assert_array_equal(
      torch[f"{up}.weight"], layer["mlp"]["up"]["kernel"].T
    )
    np.testing.assert_array_equal(
      tf1["bert/encoder/layer_1/intermediate/dense/kernel"],
      layer["mlp"]["up"]["kernel"],
    )
    # [h, d, e]: heads are the slow part of the published input axis.
    np.testing.assert_array_equal(
      torch["bert.encoder.layer.1.attention.output.dense.weight"][:, 6:].T,
      layer["attention"]["output"]["kernel"][1],
    )
    self.assertEqual(tf1["cls/seq_relationship/output_weights"].shape, (2, 12))

  def test_tf1_names_are_those_of_the_original_release(self):
    names = set(toy.published(SPEC, table=interop.TF1))
    self.assertContainsSubset(
      {
        "bert/embeddings/word_embeddings",
        "bert/embeddings/LayerNorm/gamma",
        "bert/encoder/layer_0/attention/self/query/kernel",
        "bert/encoder/layer_0/attention/output/LayerNorm/beta",
        "bert/pooler/dense/kernel",
        "cls/predictions/output_bias",
        "cls/predictions/transform/LayerNorm/gamma",
        "cls/seq_relationship/output_bias",
      },
      names,
    )

  def test_optimizer_slots_of_a_tf1_checkpoint_are_no_parameters(self):
    tensors = toy.published(SPEC, table=interop.TF1)
    for name in list(tensors):
      tensors[f"{name}/adam_m"] = tensors[f"{name}/adam_v"] = tensors[name]
    tensors["global_step"] = np.int64(7)
    toy.assert_same_trees(toy.params(SPEC), read(tensors, interop.TF1))

  def test_gamma_and_beta_are_old_names_of_a_norms_parameters(self):
    old = {
      k.replace("LayerNorm.weight", "LayerNorm.gamma").replace(
        "LayerNorm.bias", "LayerNorm.beta"
      ): v
      for k, v in toy.published(SPEC).items()
    }
    self.assertIn("bert.embeddings.LayerNorm.gamma", old)
    toy.assert_same_trees(toy.params(SPEC), read(old))

  def test_a_model_without_heads_needs_no_prefix_and_buffers_are_ignored(self):
    bare = {
      k.removeprefix("bert."): v
      for k, v in toy.published(SPEC, ("pooler",)).items()
    }
    bare["embeddings.position_ids"] = np.arange(17)[None]
    toy.assert_same_trees(toy.params(SPEC, ("pooler",)), read(bare))

  def test_repeated_tensors_must_be_equal_and_may_stand_alone(self):
    tensors = toy.published(SPEC)
    table = tensors["bert.embeddings.word_embeddings.weight"]
    bias = tensors.pop("cls.predictions.bias")
    tensors["cls.predictions.decoder.weight"] = table
    tensors["cls.predictions.decoder.bias"] = bias
    toy.assert_same_trees(toy.params(SPEC), read(tensors))
    tensors["cls.predictions.decoder.weight"] = table + 1
    with self.assertRaisesRegex(ValueError, "untied weights"):
      read(tensors)

  def test_half_precision_becomes_float32_without_change(self):
    tensors = {k: v.astype("f2") for k, v in toy.published(SPEC).items()}
    table = read(tensors)["encoder"]["embeddings"]["token"]["embedding"]
    self.assertEqual(table.dtype, np.float32)
    np.testing.assert_array_equal(
      table, tensors["bert.embeddings.word_embeddings.weight"]
    )

  def test_all_that_is_wrong_is_said_at_once(self):
    tensors = toy.published(SPEC)
    del tensors["bert.encoder.layer.1.output.dense.bias"]
    tensors["classifier.weight"] = np.zeros((2, 12), "f4")
    tensors["bert.embeddings.LayerNorm.weight"] = np.zeros(13, "f4")
    with self.assertRaises(ValueError) as caught:
      read(tensors)
    message = str(caught.exception)
    self.assertIn(
      "missing tensors: bert.encoder.layer.1.output.dense.bias", message
    )
    self.assertIn("unexpected tensors: classifier.weight", message)
    self.assertIn("LayerNorm.weight is (13,) instead of (12,)", message)

  def test_a_head_is_there_whole_or_not_at_all(self):
    tensors = toy.published(SPEC)
    del tensors["cls.predictions.transform.dense.bias"]
    with self.assertRaisesRegex(ValueError, "missing.*transform.dense.bias"):
      read(tensors)

  def test_only_what_ignore_names_may_be_left_over(self):
    tensors = toy.published(SPEC)
    tensors["classifier.weight"] = np.zeros((2, 12), "f4")
    toy.assert_same_trees(
      toy.params(SPEC), read(tensors, ignore=["^classifier"])
    )
    with self.assertRaisesRegex(
      ValueError, "'^qa' matches nothing".replace("^", r"\^")
    ):
      read(tensors, ignore=["^classifier", "^qa"])

  def test_many_names_are_counted_instead_of_listed(self):
    with self.assertRaisesRegex(ValueError, r"and \d+ more"):
      read({"other.weight": np.zeros(3, "f4")})

  def test_a_parameter_without_published_name_is_refused(self):
    params = toy.params(SPEC)
    params["encoder"]["final_norm"] = {"scale": np.ones(12, "f4")}
    with self.assertRaisesRegex(ValueError, "no name .*final_norm/scale"):
      interop.to_published(params, interop.BERT, num_layers=3)


if __name__ == "__main__":
  absltest.main()
