"""Files and prepared datasets of tasks: what their readers give."""

import json
import pathlib

import numpy as np
from absl.testing import absltest, parameterized

from bertjax.tasks import READERS, TASKS, TaskData
from tests.tasks.task_data_test import tokenizer


class ReaderTest(parameterized.TestCase):
  def folder(self):
    return pathlib.Path(self.create_tempdir())

  def read(self, name, text, suffix, **options):
    path = self.folder() / f"data{suffix}"
    path.write_text(text)
    source = READERS[name](paths=str(path), **options)
    return list(source.examples("train"))

  def test_columns(self):
    found = self.read(
      "columns",
      "-DOCSTART- -X- O\n\nEU NNP B-ORG\nrejects VBZ O\n\n\nPeter NNP B-PER\n",
      ".txt",
    )
    self.assertEqual(
      [(r["words"], r["labels"]) for r in found],
      [(["EU", "rejects"], ["B-ORG", "O"]), (["Peter"], ["B-PER"])],
    )

  def test_words_of_columns_may_hold_spaces(self):
    lines = (
      "New York\tNNP \tB-LOC\t\n10\u00a0000\tCD\tO\n\t\t\n10\u00a0000  CD O\r\n"
    )
    found = self.read("columns", lines, ".txt")
    self.assertEqual(
      [(r["words"], r["labels"]) for r in found],
      [(["New York", "10\u00a0000"], ["B-LOC", "O"]), (["10\u00a0000"], ["O"])],
    )
    tags = self.read("columns", lines, ".txt", label_column=1)[0]["labels"]
    self.assertEqual(tags, ["NNP", "CD"])

  def test_tables_with_tabs_keep_quotation_marks(self):
    found = self.read("csv", 'text\tlabel\n"so\tyes\n', ".tsv")
    self.assertEqual((found[0]["text"], found[0]["label"]), ('"so', "yes"))
    found = self.read("csv", 'text,label\n"a,b",no\n', ".csv")
    self.assertEqual((found[0]["text"], found[0]["label"]), ("a,b", "no"))

  def test_a_cell_may_be_long_and_a_record_may_have_lists(self):
    found = self.read("csv", f"text,label\n{'a ' * 100_000},no\n", ".csv")
    self.assertLen(found[0]["text"], 200_000)
    path = self.folder() / "tags.txt"
    path.write_text("".join(f"w{i} O\nx{i} O\n\n" for i in range(40)))
    halves = {"train": 0.5, "test": 0.5}
    source = READERS["columns"](paths=str(path), fractions=halves)
    found = [r["words"] for s in halves for r in source.examples(s)]
    self.assertCountEqual(found, [[f"w{i}", f"x{i}"] for i in range(40)])

  def test_squad_files(self):
    question = {
      "id": "q",
      "question": "who?",
      "answers": [{"text": "x", "answer_start": 2}],
    }
    paragraph = {"context": "a x", "qas": [question]}
    text = json.dumps({"data": [{"paragraphs": [paragraph]}]})
    (found,) = self.read("squad", text, ".json")
    self.assertEqual(found["id"], "q")
    self.assertEqual(found["answers"], {"text": ["x"], "answer_start": [2]})

  @parameterized.parameters(
    '{"question": "q", "context": "c"}',
    '{"id": 1}\n{"id": 2}\n',
    "[1]",
    '{"data": ["x"]}',
    '{"data": [{"paragraphs": [{"context": "c", "qas": ["x"]}]}]}',
    "",
  )
  def test_other_json_is_not_squad(self, text):
    with self.assertRaisesRegex(ValueError, "data.json is not as SQuAD.*jsonl"):
      self.read("squad", text, ".json")

  def test_docstrings_know_their_package(self):
    packages = ("absl-py", "optax")
    task = TASKS["docstrings"](packages=packages)
    source = READERS["docstrings"](packages=packages)
    seen = set()
    for split in ("train", "validation", "test"):
      for record in source.examples(split):
        self.assertTrue(record["id"].startswith(record["package"]))
        self.assertNotIn(record["text"].lower(), seen)
        seen.add(record["text"].lower())
    self.assertGreater(len(seen), 300)
    self.assertEqual(task.kind.labels, packages)
    with self.assertRaisesRegex(ValueError, "'optex' is not .*Close: optax"):
      READERS["docstrings"](packages=("absl-py", "optex"))

  def test_published_tasks_read_local_files_or_name_what_they_need(self):
    path = self.folder() / "rte.jsonl"
    record = {"sentence1": "ba", "sentence2": "be", "label": "entailment"}
    path.write_text(json.dumps(record))
    source = dict(name="jsonl", paths=str(path))
    task = TASKS["glue/rte"](source=source)
    self.assertEqual(task.kind.objective["num_classes"], 2)
    with self.assertRaisesRegex(ValueError, "source is required.*ending3"):
      TASKS["swag"]()

  def test_tfds_gives_nested_fields_lists_and_label_indices(self):
    try:
      import tensorflow_datasets as tfds
    except ImportError:
      self.skipTest("tensorflow_datasets is not installed")
    features = tfds.features
    numbers = {"text": features.Text(), "answer_start": np.int32}
    answers = {"text": ["bi", "bo"], "answer_start": [3, 6]}
    example = {
      "context": "ba bi bo",
      "question": "b\u00e9?",
      "answers": answers,
      "tokens": ["ba", "be"],
      "ner": ["O", "B-X"],
    }
    folder = str(self.folder())
    tfds.dataset_builders.store_as_tfds_dataset(
      name="made_up",
      version="1.0.0",
      features=features.FeaturesDict(
        {
          "context": features.Text(),
          "question": features.Text(),
          "answers": features.Sequence(numbers),
          "tokens": features.Sequence(features.Text()),
          "ner": features.Sequence(features.ClassLabel(names=["O", "B-X"])),
        }
      ),
      split_datasets={
        "train": [
          (0, example),
          (1, example | {"answers": {"text": [], "answer_start": []}}),
        ]
      },
      data_dir=folder,
      disable_shuffling=True,
    )
    source = dict(name="tfds", builder="made_up", data_dir=folder)
    common = dict(
      tokenizer=tokenizer(), seq_len=16, batch_size=2, seed=0,
      cache_dir=self.folder(),
    )  # fmt: skip
    data = TaskData(task=dict(name="squad_v2", source=source), **common)
    first, second = data.records("train")
    self.assertEqual(first["answers"], answers)
    self.assertEqual(first["question"], "b\u00e9?")
    self.assertEqual(second["answers"], {"text": [], "answer_start": []})
    # [CLS] be ? [SEP] ba bi bo [SEP]: the first answer is token 5.
    labels = data.dataset().features.arrays["labels"]
    np.testing.assert_array_equal(labels, [[5, 5], [0, 0]])
    tagging = dict(
      name="tagging", words="tokens", tags="ner", labels=["O", "B-X"]
    )
    data = TaskData(task=dict(source=source, **tagging), **common)
    labels = data.dataset().features.arrays["labels"]
    np.testing.assert_array_equal(labels[0, :4], [-1, 0, 1, -1])

  def test_table_agrees_with_tfds(self):
    try:
      import tensorflow_datasets
    except ImportError:
      self.skipTest("tensorflow_datasets is not installed")
    from bertjax.tasks.table import PUBLISHED

    for name, (kind, builder) in PUBLISHED.items():
      if builder is None:
        continue
      features = tensorflow_datasets.builder(builder).info.features
      for field in kind.fields:
        self.assertIn(field, features, name)
      label = features[kind.fields[-1]]
      names = getattr(label, "names", None) or getattr(
        getattr(label, "feature", None), "names", None
      )
      if names and getattr(kind, "labels", None):
        self.assertEqual(list(kind.labels), names, name)


if __name__ == "__main__":
  absltest.main()
