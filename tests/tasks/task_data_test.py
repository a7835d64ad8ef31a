"""Tasks from files to scores: streams repeat, tiny models learn them."""

import json
import pathlib
import random
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from bertjax import evaluate, registry, train_state, train_step
from bertjax.data.sources import preprocess
from bertjax.data.tokenizers.words import WordTokenizer
from bertjax.evals.task_metrics import task_metrics
from bertjax.loading import LoadedModel
from bertjax.models import MODELS
from bertjax.objectives.fine_tuning import FINE_TUNING
from bertjax.optim import build_optimizer
from bertjax.parallel.mesh import make_mesh
from bertjax.parallel.sharding import put_batch
from bertjax.tasks import READERS, TASKS, TaskData

WORDS = [f"{a}{b}" for a in "bdfgk" for b in ("a", "e", "i", "o", "u")]
MARKS = ("ka", "ke", "ki")  # what the labels of whole texts depend on
PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##n"]
COUNT = 16
STEPS = 200


def tokenizer():
  return WordTokenizer(PIECES, lowercase=True)


def sentence(rng, count=6, mark=None):
  """Words, among them `mark` at any place."""
  others = [w for w in WORDS if w not in MARKS]
  words = rng.sample(others, count)
  if mark is not None:
    words[rng.randrange(count)] = mark
  return " ".join(words)


def examples(make, seed=0):
  rng = random.Random(seed)
  return [make(rng, i) for i in range(COUNT)]


def answer(rng, i):
  context = " ".join(rng.sample(WORDS, 9))
  word = rng.choice(context.split())
  known = i % 4 > 0  # every fourth question has no answer
  question = (
    word if known else rng.choice(sorted({*WORDS} - {*context.split()}))
  )
  return {
    "question": question,
    "context": context,
    "answers": {
      "text": [word] if known else [],
      "answer_start": [context.index(word)] if known else [],
    },
  }


def tagged(rng, i):
  words = [w + rng.choice(("", "n")) for w in sentence(rng).split()]
  tags = [("B-X" if w[0] == "b" else "O") for w in words]
  return {"words": words, "labels": tags}


def choice(rng, i):
  marks = [MARKS[0] if k == i % 3 else None for k in range(3)]
  endings = {n: sentence(rng, 3, m) for n, m in zip("pqr", marks)}
  return {"x": sentence(rng, 3), **endings, "label": i % 3}


def pair(rng, i):
  return {"x": sentence(rng), "y": sentence(rng, 6, MARKS[i % 3])}


# Task, maker of examples, metrics of a model that learned them.
KINDS = {
  "classification": (
    dict(labels=["no", "yes"], metrics=["accuracy", "f1", "matthews"]),
    lambda rng, i: {
      "text": sentence(rng, 6, MARKS[i % 2]),
      "label": ("no", "yes")[i % 2],
    },
    {"accuracy": 1.0, "f1": 1.0, "matthews": 1.0},
  ),
  "pairs": (
    dict(labels=["a", "b"], first="x", second="y"),
    lambda rng, i: {**pair(rng, i % 2), "label": i % 2},
    {"accuracy": 1.0},
  ),
  "regression": (
    dict(first="x", second="y"),
    lambda rng, i: {**pair(rng, i), "label": float(i % 3)},
    {"pearson": 0.95},
  ),
  "tagging": (
    dict(labels=["O", "B-X", "I-X"]),
    tagged,
    {"accuracy": 1.0, "entity_f1": 1.0},
  ),
  "questions": (dict(null=True), answer, {"exact": 100.0, "f1": 100.0}),
  "choices": (
    dict(first="x", endings=["p", "q", "r"], num_choices=3),
    choice,
    {"accuracy": 1.0},
  ),
}


class TaskTestCase(parameterized.TestCase):
  def folder(self):
    return pathlib.Path(self.create_tempdir().full_path)

  def data(self, name, *, seed=3, seq_len=16, records=None, **options):
    spec, make, _ = KINDS[name]
    folder, paths = self.folder(), {}
    lines = "\n".join(map(json.dumps, records or examples(make)))
    for split in ("train", "validation"):
      paths[split] = str(folder / f"{split}.jsonl")
      pathlib.Path(paths[split]).write_text(lines)
    given = dict(tokenizer=tokenizer(), cache_dir=self.folder()) | options
    return TaskData(
      task=dict(name=name, source=dict(name="jsonl", paths=paths), **spec),
      seq_len=seq_len,
      batch_size=8,
      seed=seed,
      **given,
    )


class LearningTest(TaskTestCase):
  @parameterized.parameters(
    *(name for name in KINDS if name != "classification")
  )
  def test_tiny_model_learns(self, name):
    self._assert_learns(name)

  # Pairs are classified by the same head.
  @pytest.mark.slow
  def test_tiny_model_learns_to_classify_single_texts(self):
    self._assert_learns("classification")

  def _assert_learns(self, name):
    data = self.data(name)
    encoder = registry.build(
      MODELS,
      dict(name="bert", vocab_size=len(PIECES), num_layers=1, emb_dim=32,
           num_heads=2, max_positions=16, dropout_rate=0.0, scan=False),
      "model",
    )  # fmt: skip
    objective = registry.build(
      FINE_TUNING, data.task.kind.objective, "objective", encoder=encoder
    )
    if hasattr(objective, "dropout_rate"):
      objective = objective.clone(dropout_rate=0.0)
    spec = data.dataset().batch_spec(data.batch_size)
    params, axes = train_state.abstract_params(objective, spec)
    optimizer = build_optimizer(
      dict(
        name="adam",
        learning_rate=3e-3,
        clip_norm=1.0,
        schedule=dict(name="linear", warmup=20),
      ),
      total_steps=STEPS,
      params=params,
      logical_axes=axes,
    )
    mesh = make_mesh(devices=jax.devices()[: 2 if name == "choices" else 1])
    key = jax.random.key(0)
    _, shardings = train_state.state_shardings(
      objective, optimizer.transform, spec, mesh, key
    )
    init = jax.jit(
      lambda key: train_state.init_state(
        objective, optimizer.transform, spec, key
      ),
      out_shardings=shardings,
    )
    state = init(key)
    step = train_step.compile_step(objective, optimizer, mesh, shardings, spec)
    for i in range(STEPS):
      state, _ = step(state, put_batch(data.dataset().batch(i, 8), mesh))
    # 16 rows do not divide into batches of 6: the last one is filled.
    evaluate = task_metrics(
      objective=objective, data=data, mesh=mesh, batch_size=6
    )
    scores = evaluate({"params": state.params}, key)
    for metric, least in KINDS[name][2].items():
      self.assertGreaterEqual(scores[metric], least - 1e-9, metric)


class DatasetTest(TaskTestCase):
  def test_stream_is_a_function_of_seed_and_step(self):
    a, b = (self.data("pairs").dataset() for _ in range(2))
    self.assertEqual(a.fingerprint(), b.fingerprint())
    iterator = b.iterator(5, num_threads=1, prefetch=1)
    for step in range(7):  # beyond two epochs of 16 rows
      jax.tree.map(
        np.testing.assert_array_equal, a.batch(step, 5), next(iterator)
      )
    iterator.close()
    other = self.data("pairs", seed=4).dataset()
    self.assertNotEqual(a.fingerprint(), other.fingerprint())
    self.assertFalse(
      np.array_equal(a.rows(0, COUNT)["index"], other.rows(0, COUNT)["index"])
    )

  def test_every_epoch_has_every_row_once_in_another_order(self):
    dataset = self.data("classification").dataset()
    orders = [
      dataset.rows(e * COUNT, (e + 1) * COUNT)["index"] for e in range(3)
    ]
    for order in orders:
      np.testing.assert_array_equal(np.sort(order), np.arange(COUNT))
    self.assertFalse(np.array_equal(orders[0], orders[1]))
    self.assertEqual(dataset.epoch_of(2 * COUNT + 3), (2, 3))

  def test_processes_share_the_global_batch(self):
    dataset = self.data("tagging").dataset()
    parts = [dataset.batch(1, 6, p, 3) for p in range(3)]
    whole = dataset.batch(1, 6)
    for name, array in whole.items():
      np.testing.assert_array_equal(
        np.concatenate([p[name] for p in parts]), array
      )

  @parameterized.parameters(*KINDS)
  def test_spec_is_that_of_the_batches(self, name):
    data = self.data(name)
    expected = data.batch_spec(8)
    self.assertEqual(data.dataset().batch_spec(8), expected)
    last = list(data.dataset().evaluation_batches(6))[-1]
    self.assertEqual((last["index"] < 0).sum(), 2)
    for k, v in data.dataset().batch(0, 8).items():
      self.assertEqual(
        (v.shape, v.dtype), (expected[k].shape, expected[k].dtype)
      )

  def test_examples_can_be_limited_in_training_only(self):
    data = self.data("pairs", max_examples=5)
    self.assertEqual(data.dataset().rows_per_epoch(0), 5)
    self.assertEqual(data.dataset("validation").rows_per_epoch(0), COUNT)

  def test_missing_field_is_named(self):
    data = self.data("pairs", records=[{"x": "ba", "label": 0}])
    with self.assertRaisesRegex(ValueError, "lacks 'y'"):
      data.dataset()
    # Nothing stands in for it, least of all the label.
    data = self.data("classification", records=[{"txt": "ba", "label": "no"}])
    with self.assertRaisesRegex(
      ValueError, "lacks 'text'; it has id, label, t"
    ):
      data.dataset()

  @parameterized.parameters(*KINDS)
  def test_training_split_without_labels_is_refused(self, name):
    data = self.data(name)
    field = data.task.kind.fields[-1]
    records = [r | {field: None} for r in examples(KINDS[name][1])]
    with self.assertRaisesRegex(ValueError, f"no labels in '{field}'"):
      self.data(name, records=records).dataset()


class ContractTest(TaskTestCase):
  """What a run asks of its data, whatever the task."""

  def test_majority_and_shares_by_hand(self):
    words = ["ba", "be", "bi", "bo"]
    records = [
      {"text": w, "label": y} for w, y in zip(words, ("no", "yes", "yes", None))
    ]
    data = self.data("classification", records=[*records, records[1]])
    facts = data.facts()
    self.assertEqual(facts["class_shares"], {"no": 0.25, "yes": 0.75})
    self.assertAlmostEqual(facts["unlabelled_share"], 0.2)
    self.assertAlmostEqual(facts["duplicate_share"], 0.2)
    self.assertEqual(facts["truncated_share"], 0.0)
    # Always "yes": 3 of 4 right, precision 3/4, recall 1.
    baseline = data.baseline("validation")
    self.assertEqual(baseline["majority_accuracy"], 0.75)
    self.assertAlmostEqual(baseline["majority_f1"], 6 / 7)
    self.assertEqual(baseline["majority_matthews"], 0.0)

  @parameterized.parameters(
    ("regression", {"pearson": 0.0, "spearman": 0.0}),
    ("choices", {"accuracy": 6 / 16}),  # 0 is right in 6 of 16
    ("questions", {"exact": 25.0, "best_exact": 25.0}),  # "no answer"
    ("pairs", {"accuracy": 0.5}),
  )
  def test_guessing_the_commonest_answer(self, name, expected):
    baseline = self.data(name).baseline("validation")
    for metric, value in expected.items():
      self.assertAlmostEqual(baseline[f"majority_{metric}"], value)

  def test_without_labels_there_is_nothing_to_guess_by(self):
    make = KINDS["regression"][1]
    records = [record | {"label": None} for record in examples(make)]
    data = self.data("regression", records=records)
    self.assertEqual(data.baseline("validation"), {})

  def test_tags_are_guessed_as_the_commonest(self):
    data = self.data("tagging")
    shares = data.facts()["class_shares"]
    self.assertAlmostEqual(sum(shares.values()), 1.0)
    baseline = data.baseline("validation")
    self.assertAlmostEqual(baseline["majority_accuracy"], shares["O"])
    self.assertEqual(baseline["majority_entity_f1"], 0.0)

  def test_rows_that_do_not_fit_are_counted(self):
    data = self.data("pairs", seq_len=13)  # of 3 + 6 + 6 tokens
    self.assertEqual(data.facts()["truncated_share"], 1.0)

  def test_a_vocabulary_is_of_the_text_functions_of_its_version(self):
    options = dict(
      tokenizer=dict(name="train", kind="wordpiece", vocab_size=60),
      preprocess=["strip_html"],
      cache_dir=self.folder(),
    )
    self.data("pairs", **options)
    self.data("pairs", **options)
    with mock.patch.object(preprocess, "VERSION", preprocess.VERSION + 1):
      self.data("pairs", **options)
    self.assertLen(list(options["cache_dir"].glob("vocab-*")), 2)

  @parameterized.parameters((1, 2), (3, 6), (0.5, 1), (1.6, 4))
  def test_epochs_in_steps(self, epochs, steps):
    self.assertEqual(self.data("pairs").steps(epochs), steps)  # 16 rows by 8

  def test_the_objective_is_completed_not_contradicted(self):
    data = self.data("classification")
    self.assertEqual(
      data.objective({"dropout_rate": 0.3, "labels": ["no", "yes"]}),
      {
        "name": "classification",
        "num_classes": 2,
        "labels": ["no", "yes"],
        "multilabel": False,
        "dropout_rate": 0.3,
      },
    )
    with self.assertRaisesRegex(ValueError, r"labels=\['yes', 'no'\] does not"):
      data.objective({"labels": ["yes", "no"]})

  @parameterized.parameters(
    (False, dict(multilabel=True), "multilabel=True .* needs False"),
    (True, dict(multilabel=False), "multilabel=False .* needs True"),
    (True, {}, "multilabel=False .* needs True"),  # as older runs say it
  )
  def test_a_model_of_one_label_is_not_measured_by_several(
    self, several, said, message
  ):
    made = self.data("classification").task
    task = dict(name="classification", source=made.source, labels=["no", "yes"])
    task["multilabel"] = several
    model = mock.Mock(
      spec=LoadedModel,
      config=dict(data=dict(name="task", task=task, seq_len=16, batch_size=8)),
      objective_spec=dict(name="classification", num_classes=2) | said,
      preprocess=(),
      need_tokenizer=tokenizer,
    )
    with (
      mock.patch.object(evaluate, "load_model", return_value=model),
      self.assertRaisesRegex(ValueError, f"objective.{message}"),
    ):
      evaluate.evaluate("run", split="train")

  @parameterized.parameters(*KINDS)
  def test_predictions_agree_with_scores(self, name):
    """What is said of each record, scored by hand, is the kind's own score."""
    data = self.data(name)
    features = data.dataset().features
    rng = np.random.default_rng(0)
    tail = data.task.kind.constant_logits(features).shape
    rows = len(features.arrays["labels"])
    logits = rng.normal(size=(rows, *tail)).astype(np.float32)
    said = data.task.kind.predictions(logits, features)
    self.assertLen(said, COUNT)
    json.dumps(said)  # plain values
    records = examples(KINDS[name][1])
    score = data.task.kind.score(logits, features)
    gold = [r[data.task.kind.fields[-1]] for r in records]
    if name in ("classification", "choices"):
      key = "label" if name == "classification" else "choice"
      right = [one[key] == y for one, y in zip(said, gold)]
    elif name == "pairs":
      right = [one["label"] == "ab"[y] for one, y in zip(said, gold)]
    elif name == "tagging":
      right = [
        a == b for one, y in zip(said, gold) for a, b in zip(one["labels"], y)
      ]
    elif name == "questions":
      right = [
        100 * (one["answer"] in (y["text"] or [""]))
        for one, y in zip(said, gold)
      ]
    else:
      found = np.corrcoef([one["value"] for one in said], gold)[0, 1]
      self.assertAlmostEqual(score["pearson"], found, places=5)
      return
    metric = "exact" if name == "questions" else "accuracy"
    self.assertAlmostEqual(score[metric], np.mean(right))


class ReaderTest(TaskTestCase):
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
