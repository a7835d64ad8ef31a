"""Models are found, refused or fitted to another model by name."""

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


class InitFromTest(LoadingTestCase):
  def target(self, heads=HEADS, scan=True, **options):
    spec = toy.spec(**options)
    return toy.params(spec, heads, scan)

  @parameterized.product(source=("workdir", "published"), scan=(True, False))
  def test_the_same_model_is_taken_over_bit_for_bit(self, source, scan):
    found = loading.load_params_for(
      getattr(self, source), self.target(scan=scan)
    )
    toy.assert_same_trees(toy.params(self.spec, HEADS, scan), found)

  def test_new_parameters_need_leave_to_stay_fresh(self):
    target = self.target(names.HEADS)
    with self.assertRaisesRegex(ValueError, "it lacks pair_head/bias, .*pool"):
      loading.load_params_for(self.workdir, target)
    found = loading.load_params_for(
      self.workdir, target, allow_missing=["^pooler/", "^pair_head/"]
    )
    self.assertIsNone(found["pooler"]["dense"]["kernel"])
    self.assertIsNotNone(found["mlm_head"]["bias"])

  def test_left_over_parameters_need_leave_to_be_dropped(self):
    target = self.target(())
    with self.assertRaisesRegex(ValueError, "this model has no mlm_head/bias"):
      loading.load_params_for(self.published, target)
    for pattern, source in (
      ("^mlm_head/", self.workdir),
      ("^mlm_head/", self.published),  # by our name
      (r"^cls\.", self.published),  # by theirs
    ):
      found = loading.load_params_for(source, target, ignore=[pattern])
      self.assertNotIn("mlm_head", found)

  def test_renames_move_parameters(self):
    target = self.target()
    target["head"] = target.pop("mlm_head")
    found = loading.load_params_for(
      self.workdir, target, renames=[("^mlm_head/", "head/")]
    )
    np.testing.assert_array_equal(
      found["head"]["bias"], self.params["mlm_head"]["bias"]
    )
    with self.assertRaisesRegex(ValueError, "maps two parameters"):
      loading.load_params_for(
        self.workdir, target, renames=[("(scale|bias)$", "x")]
      )

  @parameterized.parameters("renames", "ignore", "allow_missing")
  def test_a_pattern_that_matches_nothing_is_an_error(self, field):
    pattern = ("^nothing", "") if field == "renames" else "^nothing"
    with self.assertRaisesRegex(ValueError, f"{field}.*nothing' matches no"):
      loading.load_params_for(self.workdir, self.target(), **{field: [pattern]})

  @parameterized.named_parameters(
    (
      "vocabulary",
      {"vocab_size": 30},
      "has 18 rows, this model's 30.*tokenizer",
    ),
    ("positions", {"max_positions": 5}, "17 rows, this model's 5.*max_pos"),
    ("width", {"mlp_dim": 24}, "mlp/down/kernel is .*20.* there and .*24"),
  )
  def test_another_shape_is_explained(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      loading.load_params_for(self.workdir, self.target(**options))


if __name__ == "__main__":
  absltest.main()
