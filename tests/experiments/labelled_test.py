"""A task's files depend on its records alone, and its splits share none."""

import json
import pathlib
import random

from absl.testing import absltest

from experiments import labelled


def records():
  return [
    {"id": str(i), "text": f"text {i}", "label": "ab"[i < 150], "more": "x"}
    for i in range(300)
  ]


def read(texts):
  return {
    split: [json.loads(x) for x in pathlib.Path(path).read_text().splitlines()]
    for split, path in texts.paths.items()
  }


class LabelledTest(absltest.TestCase):
  def test_files_do_not_depend_on_the_order_of_the_records(self):
    shuffled = records()
    random.Random(0).shuffle(shuffled)
    one = labelled.write(self.create_tempdir().full_path, records())
    other = labelled.write(self.create_tempdir().full_path, shuffled)
    self.assertEqual(read(one), read(other))
    self.assertEqual(one.labels, ("a", "b"))

  def test_every_record_is_in_one_split_of_the_right_size(self):
    found = read(labelled.write(self.create_tempdir().full_path, records()))
    ids = [r["id"] for part in found.values() for r in part]
    self.assertCountEqual(ids, [r["id"] for r in records()])
    # Four standard deviations of a binomial share.
    self.assertBetween(len(found["train"]), 240 - 28, 240 + 28)
    self.assertBetween(len(found["test"]), 30 - 21, 30 + 21)

  def test_the_first_examples_are_a_sample(self):
    found = read(labelled.write(self.create_tempdir().full_path, records()))
    first = [r["label"] for r in found["train"][:40]]
    self.assertBetween(first.count("a"), 8, 32)

  def test_a_complete_folder_is_left_as_it_is(self):
    folder = self.create_tempdir().full_path
    one = labelled.write(folder, records())

    def unread():
      raise AssertionError
      yield

    self.assertEqual(labelled.write(folder, unread()), one)


if __name__ == "__main__":
  absltest.main()
