"""Claims get the verdict that their conditions give, in every file alike."""

import csv
import json
import pathlib

from absl.testing import absltest, parameterized

from experiments import outcome, plots


def make(**changes):
  figure, _ = plots.panels(1)
  claims = [
    outcome.Claim("a beats b", "2x", "1.5 ± 0.1", [True, True]),
    outcome.Claim("a | b is exact", "0", "0.2", [False]),
  ]
  rows = [
    {"arm": "a", "seed": 0, "accuracy": 1 / 3, "seconds": 90.0},
    {"arm": "b", "seed": 0, "loss": 2.5, "seconds": 90.0},
  ]
  values = dict(
    paper="A paper",
    claims=claims,
    counts={"runs": 5, "measurements": 2, "others": 0},
    rows=rows,
    summary=[{"arm": "a", "accuracy": "0.333"}],
    figure=figure,
  )
  return outcome.Outcome(**(values | changes))


class OutcomeTest(parameterized.TestCase):
  @parameterized.parameters(
    ([True], "reproduced"),
    ([True, True], "reproduced"),
    ([True, False], "partly"),
    ([False, False], "not"),
  )
  def test_verdict(self, holds, verdict):
    claim = outcome.Claim("c", "p", "m", holds)
    self.assertEqual(claim.verdict, verdict)

  def test_a_claim_without_condition_is_refused(self):
    with self.assertRaisesRegex(ValueError, "'c' has no condition"):
      outcome.Claim("c", "p", "m", [])

  def test_save_writes_what_was_found(self):
    folder = pathlib.Path(self.create_tempdir())
    outcome.save(make(), folder)
    result = json.loads((folder / "result.json").read_text())
    self.assertEqual(result["paper"], "A paper")
    self.assertEqual(
      [c["verdict"] for c in result["claims"]], ["reproduced", "not"]
    )
    self.assertEqual(result["minutes"], 3.0)
    with (folder / "results.csv").open() as file:
      rows = list(csv.DictReader(file))
    self.assertEqual(rows[0]["accuracy"], "0.333333")
    self.assertEqual((rows[0]["loss"], rows[1]["loss"]), ("", "2.5"))
    self.assertTrue((folder / "results.png").exists())

  def test_the_block_of_the_readme_is_replaced_and_nothing_else(self):
    folder = pathlib.Path(self.create_tempdir())
    readme = folder / "README.md"
    readme.write_text(
      f"# Title\n\n{outcome._BEGIN}\nold\n{outcome._END}\n\nThe end \\1.\n"
    )
    outcome.save(make(), folder)
    once = readme.read_text()
    self.assertStartsWith(once, "# Title\n\n")
    self.assertEndsWith(once, "\n\nThe end \\1.\n")
    self.assertNotIn("old", once)
    self.assertIn("| a beats b | 2x | 1.5 ± 0.1 | reproduced |", once)
    self.assertIn("| a \\| b is exact |", once)
    self.assertIn("5 runs, 2 measurements, 3 minutes", once)
    outcome.save(make(), folder)
    self.assertEqual(readme.read_text(), once)

  def test_a_readme_without_place_is_refused(self):
    folder = pathlib.Path(self.create_tempdir())
    (folder / "README.md").write_text("# Title\n")
    with self.assertRaisesRegex(ValueError, "no place for the results; add"):
      outcome.save(make(), folder)


if __name__ == "__main__":
  absltest.main()
