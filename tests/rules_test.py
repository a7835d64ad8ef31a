import jax.numpy as jnp
from absl.testing import absltest

from bertjax import rules

_TREE = {"a": {"kernel": jnp.ones(2), "bias": jnp.ones(3)}, "b": jnp.ones(())}


class RulesTest(absltest.TestCase):
  def test_first_match_wins(self):
    matched = rules.match([("a/bias", 1), ("^a", 2), (".*", 3)], _TREE, "f")
    self.assertEqual(matched, {"a": {"kernel": 2, "bias": 1}, "b": 3})

  def test_an_unmatched_parameter_is_named(self):
    with self.assertRaisesRegex(ValueError, "optim.rates: no rule .*'b'"):
      rules.match([("^a", 1)], _TREE, "optim.rates")

  def test_an_unused_pattern_is_named(self):
    with self.assertRaisesRegex(ValueError, "'kernle' matches no parameter"):
      rules.match([("kernle", 1), (".*", 2)], _TREE, "f")


if __name__ == "__main__":
  absltest.main()
