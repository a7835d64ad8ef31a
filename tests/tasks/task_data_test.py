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
from bertjax.tasks import TaskData

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


if __name__ == "__main__":
  absltest.main()
