from absl.testing import absltest, parameterized

from bertjax import registry


def _adam(learning_rate, *, eps=1e-6):
  return "adam", learning_rate, eps


_TABLE = {"adam": _adam, "lamb": lambda learning_rate: learning_rate}


class RegistryTest(parameterized.TestCase):
  def test_a_row_is_called_with_the_rest_of_the_spec(self):
    spec = dict(name="adam", learning_rate=0.1)
    self.assertEqual(
      registry.build(_TABLE, spec, "optim", eps=2.0), ("adam", 0.1, 2.0)
    )
    self.assertEqual(spec, dict(name="adam", learning_rate=0.1))

  @parameterized.parameters(
    (dict(name="adm", learning_rate=1), "optim.name='adm' .*adam, lamb.*Did"),
    (dict(learning_rate=1), "optim.name is missing"),
    ("adam", r"optim='adam' must be a dict: dict\(name=...\)"),
    (["adam"], r"optim=\['adam'\] must be a dict"),
    (None, "optim=None must be a dict"),
    (dict(name="adam", learning_rat=1), "optim.learning_rat .*Did you mean 'l"),
    (dict(name="adam"), "optim.learning_rate is required"),
    (dict(name="adam", learning_rate=1, eps=1), "optim.eps is set by the lib"),
  )
  def test_a_bad_spec_is_refused_by_field(self, spec, message):
    with self.assertRaisesRegex(ValueError, message):
      registry.build(
        _TABLE, spec, "optim", **{"eps": 1} if "eps" in (spec or ()) else {}
      )


if __name__ == "__main__":
  absltest.main()
