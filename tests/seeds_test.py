"""Each random choice of a run has a seed of its own."""

import pathlib
import tempfile

import jax
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import experiment
from bertjax.config import settings
from tests import tiny


class SeedsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.folder = pathlib.Path(folder)
    tiny.write_corpus(cls.folder)
    cls.base = cls.drawn()

  @classmethod
  def build(cls, **changes):
    config = tiny.config(cls.folder, evals={}, **changes)
    return experiment.build(settings(config))

  @classmethod
  def drawn(cls, **changes):
    """What a run draws from, by the field of `Seeds` that decides it."""
    built = cls.build(**changes)
    rows = built.data.dataset()
    original = rows.originals(0, 20)
    masked = rows.rows(0, 20)
    return {
      "init": [np.asarray(jax.random.key_data(built.key))],
      "dropout": [np.asarray(jax.random.key_data(built.step_key))],
      "data": [original["tokens"], original["type_ids"]],
      "masks": [masked["masked_positions"], masked["labels"]],
    }

  @parameterized.parameters("init", "dropout", "masks", "data")
  def test_a_seed_changes_what_it_names_and_nothing_else(self, what):
    found = self.drawn(seeds={what: 11})
    for name, arrays in self.base.items():
      same = all(map(np.array_equal, arrays, found[name]))
      # Labels follow the text that they mask.
      if (what, name) != ("data", "masks"):
        self.assertEqual(same, name != what, name)

  def test_parameters_follow_one_seed_and_the_steps_another(self):
    model = dict(num_layers=1)
    base, init, dropout = (
      self.build(model=model, seeds=seeds).init()
      for seeds in ({}, dict(init=11), dict(dropout=11))
    )
    kernels = [np.asarray(s.params["pooler"]["dense"]["kernel"])
               for s in (base, init, dropout)]  # fmt: skip
    keys = [np.asarray(jax.random.key_data(s.key))
            for s in (base, init, dropout)]  # fmt: skip
    self.assertFalse(np.array_equal(kernels[0], kernels[1]))
    np.testing.assert_array_equal(kernels[0], kernels[2])
    np.testing.assert_array_equal(keys[0], keys[1])
    self.assertFalse(np.array_equal(keys[0], keys[2]))

  def test_seed_is_the_default_of_all(self):
    named = dict.fromkeys(("init", "dropout", "masks", "data"), 9)
    for ours, theirs in zip(
      self.drawn(seed=9).values(), self.drawn(seeds=named).values()
    ):
      jax.tree.map(np.testing.assert_array_equal, ours, theirs)

  @parameterized.named_parameters(
    ("unknown", dict(mask=1), "seeds.mask is not an option.*'masks'"),
    ("negative", dict(init=-1), r"seeds.init=-1 must be an integer in 0\.\."),
  )
  def test_a_bad_seed_is_refused(self, seeds, message):
    with self.assertRaisesRegex(ValueError, message):
      settings(tiny.config(self.folder, seeds=seeds))

  def test_a_task_has_no_masks_to_seed(self):
    config = tiny.config(self.folder, seeds=dict(masks=1))
    config["data"] = dict(name="task")
    with self.assertRaisesRegex(
      ValueError, "seeds.masks=1: data.name='task' draws no masks"
    ):
      experiment.build(settings(config))


if __name__ == "__main__":
  absltest.main()
