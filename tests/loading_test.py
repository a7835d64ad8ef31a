"""Models are found, or refused with what would be one."""

import json
import pathlib
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import convert, interop, loading
from bertjax.interop import names
from tests.interop import toy

HEADS = ("mlm_head",)


class LoadingTestCase(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    cls.spec = toy.spec()
    cls.params = toy.params(cls.spec, HEADS)
    cls.published = cls.root / "published"
    interop.write_huggingface(
      cls.published, cls.spec, cls.params, toy.word_tokenizer()
    )
    cls.workdir = cls.root / "workdir"
    convert.convert(cls.published, cls.workdir, format="bertjax")


class LoadModelTest(LoadingTestCase):
  @parameterized.product(scan=(None, True, False))
  def test_a_workdir_and_a_published_folder_hold_the_same_model(self, scan):
    a = loading.load_model(self.workdir, scan=scan)
    b = loading.load_model(self.published, scan=scan)
    self.assertEqual((a.origin, b.origin), ("workdir", "huggingface"))
    toy.assert_same_trees(a.params, b.params)
    self.assertEqual(a.spec, b.spec)
    self.assertEqual("layers" in a.params["encoder"], scan is not False)
    self.assertEqual(a.heads, {"mlm_head"})
    self.assertEqual(a.max_positions, 17)
    self.assertIsNone(b.config)
    self.assertEqual(a.config["model"], self.spec)
    text = "the cats sat."
    np.testing.assert_array_equal(
      a.tokenizer.encode(text), b.tokenizer.encode(text)
    )

  def test_bfloat16_casts_what_every_product_casts_anyway(self):
    half = loading.load_model(self.published, dtype=jnp.bfloat16)
    dtypes = {k: v.dtype for k, v in names.flatten(half.params).items()}
    for name, dtype in dtypes.items():
      is_cast = name.endswith(("kernel", "token/embedding"))
      self.assertEqual(dtype == jnp.bfloat16, is_cast, name)
    # Kernels alone: the very numbers of the uncast model at this dtype.
    batch = {"tokens": jnp.arange(12, dtype=np.int32).reshape(2, 6)}
    whole = loading.load_model(self.published)
    params = jax.tree.map(lambda x: x, whole.params)
    table = half.params["encoder"]["embeddings"]["token"]["embedding"]
    params["encoder"]["embeddings"]["token"]["embedding"] = table
    np.testing.assert_array_equal(
      *(
        half.objective.apply({"params": p}, batch, method="encode")
        for p in (half.params, params)
      )
    )

  def test_options_of_the_model_can_be_replaced(self):
    model = loading.load_model(self.published, keep_layers=True)
    encoded = model.objective.apply(
      {"params": model.params},
      {"tokens": jnp.zeros((1, 4), np.int32)},
      method=lambda m, b: m.encoder(b),
    )
    self.assertLen(encoded.layers, 4)

  def test_a_folder_that_is_no_model_is_refused_with_what_would_be(self):
    with self.assertRaisesRegex(ValueError, "is not a folder"):
      loading.load_model(self.root / "nowhere")
    empty = self.root / "empty"
    empty.mkdir()
    with self.assertRaisesRegex(
      ValueError, "checkpoints/.*model.safetensors.*bert_config.json"
    ):
      loading.load_model(empty)
    for name in ("seed=1/two", "one"):
      (empty / name / "checkpoints").mkdir(parents=True)
    with self.assertRaisesRegex(
      ValueError, "no model itself, as .* name a part of it: one, seed=1/two"
    ):
      loading.load_model(empty)
    with self.assertRaisesRegex(ValueError, "step=3.*not a workdir"):
      loading.load_model(self.published, step=3)

  def test_a_tokenizer_of_another_model_is_refused(self):
    folder = self.root / "mixed"
    interop.write_huggingface(folder, self.spec, self.params, None)
    pieces = [*toy.word_tokenizer().vocabulary, "one", "more"]
    (folder / "vocab.txt").write_text("".join(f"{p}\n" for p in pieces))
    with self.assertRaisesRegex(ValueError, "20 pieces, the model 18 rows"):
      loading.load_model(folder)

  def test_what_a_model_lacks_is_said_when_it_is_needed(self):
    folder = self.root / "bare"
    interop.write_huggingface(
      folder, self.spec, toy.params(self.spec, ("pooler",)), None
    )
    model = loading.load_model(folder)
    with self.assertRaisesRegex(ValueError, "no tokenizer.*vocab.txt"):
      model.need_tokenizer()
    with self.assertRaisesRegex(ValueError, "no mlm_head, which x needs.*pool"):
      model.need_head("mlm_head", "x")

  def test_a_foreign_checkpoint_is_refused(self):
    folder = self.root / "foreign"
    model = loading.load_model(self.workdir)
    convert.write_workdir(model, folder, "float32")
    for meta in folder.glob("checkpoints/0/meta.json"):
      content = json.loads(meta.read_text())
      del content["config"]["model"]
      meta.write_text(json.dumps(content))
      manifest = meta.with_name("manifest.json")
      from bertjax.checkpoint import disk

      manifest.write_text(
        json.dumps(disk.manifest_of(disk.epath.Path(meta.parent)))
      )
    with self.assertRaisesRegex(ValueError, "no 'model'.*bertjax.train"):
      loading.load_model(folder)


if __name__ == "__main__":
  absltest.main()
