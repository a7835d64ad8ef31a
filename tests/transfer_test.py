"""Parameters are fitted to another model by name, or refused by name."""

import numpy as np
from absl.testing import absltest, parameterized

from bertjax import transfer
from bertjax.interop import names
from tests.interop import toy
from tests.loading_test import HEADS, LoadingTestCase


class LoadParamsForTest(LoadingTestCase):
  def target(self, heads=HEADS, scan=True, **options):
    spec = toy.spec(**options)
    return toy.params(spec, heads, scan)

  @parameterized.product(source=("workdir", "published"), scan=(True, False))
  def test_the_same_model_is_taken_over_bit_for_bit(self, source, scan):
    found = transfer.load_params_for(
      getattr(self, source), self.target(scan=scan)
    )
    toy.assert_same_trees(toy.params(self.spec, HEADS, scan), found)

  def test_new_parameters_need_leave_to_stay_fresh(self):
    target = self.target(names.HEADS)
    with self.assertRaisesRegex(ValueError, "it lacks pair_head/bias, .*pool"):
      transfer.load_params_for(self.workdir, target)
    found = transfer.load_params_for(
      self.workdir, target, allow_missing=["^pooler/", "^pair_head/"]
    )
    self.assertIsNone(found["pooler"]["dense"]["kernel"])
    self.assertIsNotNone(found["mlm_head"]["bias"])

  def test_left_over_parameters_need_leave_to_be_dropped(self):
    target = self.target(())
    with self.assertRaisesRegex(ValueError, "this model has no mlm_head/bias"):
      transfer.load_params_for(self.published, target)
    for pattern, source in (
      ("^mlm_head/", self.workdir),
      ("^mlm_head/", self.published),  # by our name
      (r"^cls\.", self.published),  # by theirs
    ):
      found = transfer.load_params_for(source, target, ignore=[pattern])
      self.assertNotIn("mlm_head", found)

  def test_renames_move_parameters(self):
    target = self.target()
    target["head"] = target.pop("mlm_head")
    found = transfer.load_params_for(
      self.workdir, target, renames=[("^mlm_head/", "head/")]
    )
    np.testing.assert_array_equal(
      found["head"]["bias"], self.params["mlm_head"]["bias"]
    )
    with self.assertRaisesRegex(ValueError, "maps two parameters"):
      transfer.load_params_for(
        self.workdir, target, renames=[("(scale|bias)$", "x")]
      )

  def test_a_rename_matches_what_those_before_it_leave(self):
    target = self.target()
    target["head"] = target.pop("mlm_head")
    first = ("^mlm_head/", "between/")
    found = transfer.load_params_for(
      self.workdir, target, renames=[first, ("^between/", "head/")]
    )
    np.testing.assert_array_equal(
      found["head"]["bias"], self.params["mlm_head"]["bias"]
    )
    with self.assertRaisesRegex(
      ValueError, "renames: pattern 'mlm_head/bias' matches nothing"
    ):
      transfer.load_params_for(
        self.workdir, target, renames=[first, ("mlm_head/bias", "x")]
      )

  @parameterized.parameters("renames", "ignore", "allow_missing")
  def test_a_pattern_that_matches_nothing_is_an_error(self, field):
    pattern = ("^nothing", "") if field == "renames" else "^nothing"
    with self.assertRaisesRegex(ValueError, f"{field}.*nothing' matches no"):
      transfer.load_params_for(
        self.workdir, self.target(), **{field: [pattern]}
      )

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
      transfer.load_params_for(self.workdir, self.target(**options))


if __name__ == "__main__":
  absltest.main()
