"""What the benchmarks feed to both sides holds the same tokens."""

import json
import pathlib

import numpy as np
from absl.testing import absltest

from benchmarks import __main__ as command
from benchmarks import history, ragged


class RaggedTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    rng = np.random.default_rng(0)
    lengths = (20, 31, 17, 9, 30, 25, 3, 11)
    self.texts = [rng.integers(5, 99, length) for length in lengths]

  def test_rows_hold_whole_documents_once(self):
    batch = ragged.packed(self.texts, 32)
    ids, positions = batch["segment_ids"], batch["positions"]
    found = []
    for row, number in {(r, n) for r in range(len(ids)) for n in ids[r]}:
      if number:
        here = ids[row] == number
        found.append(tuple(batch["tokens"][row, here]))
        np.testing.assert_array_equal(positions[row, here], range(here.sum()))
    self.assertCountEqual(found, [tuple(text) for text in self.texts])

  def test_masked_positions_are_of_real_tokens(self):
    batch = ragged.packed(self.texts, 32)
    there = np.take_along_axis(batch["tokens"], batch["masked_positions"], 1)
    used = batch["labels"] > 0
    self.assertGreater(used.sum(), 0.1 * sum(map(len, self.texts)))
    np.testing.assert_array_equal(there[used], batch["labels"][used])

  def test_parts_hold_all_rows(self):
    batch = ragged.packed(self.texts, 32)
    parts = ragged.split(batch, 3)
    self.assertLen({part["tokens"].shape for part in parts}, 1)
    rows = np.concatenate([part["tokens"] for part in parts])
    count = len(batch["tokens"])
    np.testing.assert_array_equal(rows[:count], batch["tokens"])
    self.assertEqual(rows[count:].sum(), 0)

  def test_padded_batches_hold_the_same_tokens(self):
    real = 0
    for tokens, mask, labels in ragged.padded(self.texts, 3):
      self.assertEqual((tokens * (1 - mask)).sum(), 0)
      self.assertTrue(((labels == -100) | (labels == tokens)).all())
      real += mask.sum()
    self.assertEqual(real, sum(map(len, self.texts)))


class HistoryTest(absltest.TestCase):
  def test_runs_are_appended_and_shown_by_commit(self):
    path = pathlib.Path(self.create_tempdir()) / "history.jsonl"
    self.assertEqual(history.read(path), [])
    history.append(path, {"step": {"train/ratio": 1.25}}, "a1b2", "day 1")
    history.append(
      path,
      {"step": {"train/ratio": 1.5}, "compiling": {"first_s": 20.0}},
      "c3d4",
      "day 2",
    )
    self.assertLen(path.read_text().splitlines(), 2)
    table = history.table(history.read(path))
    self.assertEqual([row["commit"] for row in table], ["a1b2", "c3d4"])
    self.assertEqual(
      [row["step train ratio"] for row in table], ["1.25", "1.5"]
    )
    self.assertEqual(table[0].get("compiling first_s", ""), "")
    self.assertEqual(table[1]["compiling first_s"], "20")

  def test_a_line_that_no_run_wrote_is_named(self):
    path = pathlib.Path(self.create_tempdir()) / "history.jsonl"
    path.write_text(json.dumps({"commit": "x"}) + "\n")
    with self.assertRaisesRegex(ValueError, "history.jsonl, line 1"):
      history.read(path)


class CommandTest(absltest.TestCase):
  def test_an_unknown_part_is_refused_before_anything_runs(self):
    with self.assertRaisesRegex(ValueError, "part='stepp' is unknown.*'step'"):
      command.measured(["reading", "stepp"])


if __name__ == "__main__":
  absltest.main()
