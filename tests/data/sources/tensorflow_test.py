"""Sources that go through TensorFlow; one file, for its import takes long."""

import os
import pathlib
import subprocess
import sys
import tempfile
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

from bertjax import registry
from bertjax.data.sources import (
  CORPORA,
  SOURCES,
  base,
  tensorflow_io,
  to_seqio_task,
)

tf = pytest.importorskip("tensorflow")
tfds = pytest.importorskip("tensorflow_datasets")
seqio = pytest.importorskip("seqio")

_REPOSITORY = pathlib.Path(__file__).parents[3]
_TEXTS = [f"Text {i}: भाषा, \n語." for i in range(30)]


def build(**spec):
  return registry.build(SOURCES, spec, "data.source")


def texts_of(source, split="train"):
  return [e["text"] for e in source.examples(split)]


def example_of(**features):
  return tf.train.Example(
    features=tf.train.Features(
      feature={
        name: tf.train.Feature(bytes_list=tf.train.BytesList(value=value))
        for name, value in features.items()
      }
    )
  ).SerializeToString()


class TfrecordTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = self.enterContext(tempfile.TemporaryDirectory())

  def write(self, name, records):
    path = os.path.join(self.folder, name)
    options = "GZIP" if name.endswith(".gz") else ""
    with tf.io.TFRecordWriter(path, options) as writer:
      for record in records:
        writer.write(record)
    return path

  @parameterized.parameters("a.tfrecord", "a.tfrecord.gz")
  def test_plain_and_compressed(self, name):
    records = [
      example_of(
        body=[t.encode()],
        key=[b"k%d" % i],
        tags=[b"x", b"y"],
        kind=[b"news" if i % 3 else "भाषा".encode()],
        digest=[b"\xff%d" % (i % 2)],
      )
      for i, t in enumerate(_TEXTS)
    ]
    path = self.write(name, records)
    source = build(
      name="tfrecord", paths=path, text_field="body", id_field="key",
      features=["tags"],
    )  # fmt: skip
    found = list(source.examples("train"))
    self.assertEqual([e["text"] for e in found], _TEXTS)
    self.assertEqual(found[3]["id"], "k3")
    self.assertEqual(found[3]["tags"], ["x", "y"])

    def read(**options):
      spec = dict(paths=path, text_field="body", features=["kind", "digest"])
      return texts_of(build(name="tfrecord", **spec, **options))

    # Rules see strings, and bytes only where they are no text.
    kept = read(filters=[dict(name="field", field="kind", values="भाषा")])
    self.assertEqual(kept, _TEXTS[::3])
    folds = dict(name="k_fold", k=2, fold=0, field="digest")
    self.assertIn(read(split=folds), (_TEXTS[::2], _TEXTS[1::2]))

  def test_bad_files_are_named(self):
    path = self.write("a.tfrecord", [example_of(body=[b"x"], key=[b"y"])])
    with self.assertRaisesRegex(
      ValueError, r"a\.tfrecord, record 0 has no field 'text'; it has body, key"
    ):
      texts_of(build(name="tfrecord", paths=path))
    os.truncate(path, os.path.getsize(path) - 2)
    with self.assertRaisesRegex(ValueError, "a.tfrecord is no whole TFRecord"):
      texts_of(build(name="tfrecord", paths=path))
    path = self.write("b.tfrecord", [b"\xff\xff not a message"])
    with self.assertRaisesRegex(ValueError, "b.tfrecord does not hold tf.Exam"):
      texts_of(build(name="tfrecord", paths=path))


class TfdsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.folder = cls.enterClassContext(tempfile.TemporaryDirectory())
    cls.store("notes", _TEXTS)

  @classmethod
  def store(cls, name, texts, version="1.0.0", folder=None, num_shards=None):
    tfds.dataset_builders.store_as_tfds_dataset(
      name=name,
      version=version,
      features=tfds.features.FeaturesDict(
        {"body": tfds.features.Text(), "year": tf.int64}
      ),
      split_datasets={
        "train": [
          (i, {"body": t, "year": 2000 + i}) for i, t in enumerate(texts)
        ],
        "test": [
          (i, {"body": "Held out.", "year": 1}) for i in range(num_shards or 1)
        ],
      },
      data_dir=folder or cls.folder,
      disable_shuffling=True,
      download_config=tfds.download.DownloadConfig(num_shards=num_shards),
    )

  def source(self, **options):
    options = {
      "builder": "notes",
      "text_field": "body",
      "data_dir": self.folder,
      **options,
    }
    return build(name="tfds", **options)

  def test_stored_dataset_is_read_in_order(self):
    source = self.source(features=["year", "body"])
    self.assertCountEqual(source.splits, ["train", "test"])
    found = list(source.examples("train"))
    self.assertEqual([e["text"] for e in found], _TEXTS)
    self.assertEqual([e["body"] for e in found], _TEXTS)
    self.assertEqual([e["year"] for e in found], list(range(2000, 2030)))
    self.assertLen({e["id"] for e in found}, 30)
    self.assertEqual(texts_of(source, "test"), ["Held out."])

  def test_parts_are_files(self):
    self.store("files", _TEXTS, num_shards=3)
    source = self.source(builder="files", splits={"train": "train"})
    parts = base.parts(source, "train")
    self.assertLen(parts, 3)
    read = [list(part()) for part in reversed(parts)][::-1]
    together = [example for part in read for example in part]
    self.assertEqual(together, list(source.examples("train")))
    self.assertEqual([e["text"] for e in together], _TEXTS)
    sliced = self.source(builder="files", splits={"train": "train[:20]"})
    (part,) = base.parts(sliced, "train")
    self.assertEqual([e["text"] for e in part()], _TEXTS[:20])

  def test_slices_and_hashes_make_splits(self):
    sliced = self.source(splits={"train": "train[:20]", "dev": "train[20:]"})
    self.assertEqual(texts_of(sliced), _TEXTS[:20])
    self.assertEqual(texts_of(sliced, "dev"), _TEXTS[20:])
    hashed = self.source(fractions={"train": 0.6, "dev": 0.4})
    self.assertCountEqual(texts_of(hashed) + texts_of(hashed, "dev"), _TEXTS)

  def test_fingerprint_follows_data_and_options(self):
    prints = {
      self.source().fingerprint(),
      self.source(text_field="body", features=["year"]).fingerprint(),
      self.source(splits={"train": "train[:20]"}).fingerprint(),
    }
    with tempfile.TemporaryDirectory() as folder:
      self.store("notes", [*_TEXTS, "More."], folder=folder)
      prints.add(self.source(data_dir=folder).fingerprint())
    self.assertLen(prints, 4)

  @parameterized.named_parameters(
    ("builder", dict(builder="nots"), "builder='nots' cannot be opened"),
    ("field", dict(text_field="text"), "no feature 'text'; it has body, year"),
    ("unprepared", dict(builder="wiki40b/en", text_field="text"),
     "no prepared data in .*tfds build wiki40b/en"),
  )  # fmt: skip
  def test_bad_options(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      self.source(**options)

  @parameterized.parameters(
    sorted(
      name
      for name, row in CORPORA.items()
      if row.reader == "tfds" and name != "wikipedia_2022"
    )
  )
  def test_corpus_rows_name_real_builders_fields_and_splits(self, corpus):
    language = {} if CORPORA[corpus].language is None else {"language": "tr"}
    with (
      tempfile.TemporaryDirectory() as empty,
      tfds.testing.mock_data(num_examples=3),
    ):
      source = build(name="corpus", corpus=corpus, data_dir=empty, **language)
      self.assertNotIn("{", str(source.splits))
      for split in source.splits:
        try:
          found = list(source.examples(split))
        except ValueError as err:  # 3 examples dealt out at 98, 1 and 1 %
          self.assertIn("none falls there", str(err))
          self.assertNotEqual(split, "train")
          continue
        self.assertTrue(all(isinstance(e["text"], str) for e in found))

  def test_older_wikipedia_is_read_where_it_is_prepared(self):
    with tempfile.TemporaryDirectory() as folder:
      tfds.dataset_builders.store_as_tfds_dataset(
        name="wikipedia",
        config="20220301.de",
        version="1.0.0",
        features=tfds.features.FeaturesDict(
          {"title": tfds.features.Text(), "text": tfds.features.Text()}
        ),
        split_datasets={
          "train": [
            (i, {"title": "t", "text": t}) for i, t in enumerate(_TEXTS)
          ]
        },
        data_dir=folder,
      )
      source = build(
        name="corpus",
        corpus="wikipedia_2022",
        language="de",
        data_dir=folder,
        fractions={"train": 1.0},
      )
      self.assertCountEqual(texts_of(source), _TEXTS)


class SeqioTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    seqio.TaskRegistry.reset()
    seqio.MixtureRegistry.reset()

  def add(self, name, texts, vocabulary=None):
    def dataset_fn(split, shuffle_files=False, seed=None):
      part = texts if split == "train" else texts[:2]
      return tf.data.Dataset.from_tensor_slices({"targets": part})

    raw = seqio.Feature(
      seqio.PassThroughVocabulary(0), add_eos=False, dtype=tf.string, rank=0
    )
    return seqio.TaskRegistry.add(
      name,
      source=seqio.FunctionDataSource(
        dataset_fn, splits=["train", "validation"]
      ),
      preprocessors=[]
      if vocabulary is None
      else [seqio.preprocessors.tokenize],
      output_features={
        "targets": raw
        if vocabulary is None
        else seqio.Feature(vocabulary, add_eos=False)
      },
    )

  def test_task_of_strings(self):
    self.add("plain", _TEXTS)
    source = build(name="seqio", task="plain")
    self.assertEqual(source.splits, ("train", "validation"))
    self.assertEqual(texts_of(source), _TEXTS)
    self.assertEqual(texts_of(source, "validation"), _TEXTS[:2])

  def test_task_of_ids_is_decoded_by_its_vocabulary(self):
    self.add("bytes", _TEXTS, seqio.ByteVocabulary())
    self.assertEqual(texts_of(build(name="seqio", task="bytes")), _TEXTS)

  def test_mixture_is_read_once_and_repeatably(self):
    self.add("a", [f"a{i}" for i in range(20)])
    self.add("b", [f"b{i}" for i in range(20)])
    seqio.MixtureRegistry.add("both", [("a", 1), ("b", 1)])
    source = build(name="seqio", task="both")
    found = texts_of(source)
    self.assertEqual(found, texts_of(source))
    self.assertLen(set(found), len(found))
    self.assertEqual({t[0] for t in found}, {"a", "b"})

  def test_part_of_a_split_by_hash(self):
    self.add("plain", _TEXTS)
    source = build(
      name="seqio", task="plain", fractions={"train": 0.5, "test": 0.5}
    )
    self.assertCountEqual(texts_of(source) + texts_of(source, "test"), _TEXTS)

  def test_bad_options(self):
    self.add("plain", _TEXTS)
    with self.assertRaisesRegex(ValueError, "task='plane'.*there are plain"):
      build(name="seqio", task="plane")
    with self.assertRaisesRegex(ValueError, "feature='text'.*targets"):
      build(name="seqio", task="plain", feature="text")

  def test_our_source_becomes_a_task_and_comes_back(self):
    with tempfile.TemporaryDirectory() as folder:
      for i, text in enumerate(_TEXTS):
        pathlib.Path(folder, f"{i:02}.txt").write_text(text)
      ours = build(name="text_files", paths=f"{folder}/*.txt")
      task = to_seqio_task("ours", ours)
      self.add("other", ["other"] * 3)
      seqio.MixtureRegistry.add("mixed", ["ours"], default_rate=1)
      self.assertEqual(
        [e["id"].decode() for e in task.source.get_dataset("train").take(2)
         .as_numpy_iterator()],
        ["00.txt:0", "01.txt:0"],
      )  # fmt: skip
      for name in ("ours", "mixed"):
        back = build(name="seqio", task=name, feature="text")
        self.assertEqual(texts_of(back), _TEXTS)

  def test_task_with_a_tokenizer_gives_what_seqio_users_expect(self):
    with tempfile.TemporaryDirectory() as folder:
      pathlib.Path(folder, "a.txt").write_text("abc")
      ours = build(name="text_files", paths=f"{folder}/*.txt")
      task = to_seqio_task(
        "tokens",
        ours,
        text_feature="targets",
        preprocessors=[
          seqio.preprocessors.tokenize,
          seqio.preprocessors.append_eos,
        ],
        output_features={"targets": seqio.Feature(seqio.ByteVocabulary())},
      )
      dataset = task.get_dataset({"targets": 8}, split="train", shuffle=False)
      seqio.test_utils.assert_dataset(
        dataset.map(lambda e: {"targets": e["targets"]}),
        [{"targets": [100, 101, 102, 1]}],  # bytes from 3 on, then EOS
      )


class ImportTest(absltest.TestCase):
  def test_missing_library_names_the_extra(self):
    with (
      mock.patch.dict(sys.modules, {"tensorflow_datasets": None}),
      self.assertRaisesRegex(ImportError, r"'bertjax\[tfds\]'"),
    ):
      build(name="tfds", builder="lm1b")

  def test_importing_sources_imports_no_tensorflow(self):
    program = (
      "import sys; import bertjax.data.sources, bertjax.data.cache;"
      "print([m for m in ('tensorflow', 'seqio', 'jax', 'pyarrow', 'grain')"
      " if m in sys.modules])"
    )
    out = subprocess.run(
      [sys.executable, "-c", program],
      cwd=_REPOSITORY,
      stdout=subprocess.PIPE,
      text=True,
      check=True,
    )
    self.assertEqual(out.stdout.strip(), "[]")

  def test_tensorflow_sees_no_accelerator(self):
    tensorflow_io.load("tensorflow")
    self.assertEqual(tf.config.get_visible_devices("GPU"), [])


if __name__ == "__main__":
  absltest.main()
