"""From pre-training to an exported classifier, as a user goes about it."""

import atexit
import contextlib
import csv
import dataclasses
import functools
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import tempfile
from unittest import mock

import pytest
from absl.testing import absltest, parameterized

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import jax
import numpy as np
import torch
import transformers

from bertjax import (
  convert,
  evaluate,
  experiment,
  loading,
  loop,
  predict,
  registry,
  train,
)
from bertjax.checkpoint import load_params
from bertjax.config import merge, settings
from bertjax.data.sources import SOURCES
from bertjax.handover import initial_state
from tests import processes, tiny

pytestmark = pytest.mark.usefixtures("one_device")

_ROOT = pathlib.Path(__file__).parents[1]
_LABELS = ("animal", "bread")
_TEXTS = ("the loaf of room 3 burns every day .", "the dog barks .", "oven")


def write_task(folder: pathlib.Path) -> None:
  """Sentences of the pre-training corpus with their topic, by split."""
  rng = random.Random(0)
  for split, count in (("train", 72), ("validation", 21), ("test", 15)):
    lines = []
    for _ in range(count):
      label = min(rng.randrange(3), 1)  # bread is twice as common
      words = tiny.TOPICS[2 * label]
      noun, verb = rng.choice(words[:3]), rng.choice(words[3:])
      text = f"the {noun} of room {rng.randrange(30)} {verb} every day ."
      lines.append(json.dumps({"text": text, "label": _LABELS[label]}))
    (folder / f"{split}.jsonl").write_text("\n".join(lines))


@functools.cache
def pretrained() -> pathlib.Path:
  """The workdir of a short pre-training, beside which the task lies."""
  folder = tempfile.TemporaryDirectory()
  atexit.register(folder.cleanup)
  root = pathlib.Path(folder.name)
  tiny.write_corpus(root)
  write_task(root)
  with unreported():
    train.train(tiny.config(root, stop=dict(steps=2)), root / "pretrained")
  return root / "pretrained"


def unreported():
  """No plots, which take longer than the steps; EndToEndTest has some."""
  return mock.patch.object(train.report, "write_report")


@contextlib.contextmanager
def breaking_at(last):
  """Runs end by an error as soon as they have logged this step."""
  fit = loop.fit

  def breaking(*arguments, log, **options):
    def log_or_break(step, metrics):
      log(step, metrics)
      if step + 1 == last:
        raise OSError("no power")

    return fit(*arguments, log=log_or_break, **options)

  with mock.patch.object(loop, "fit", breaking):
    yield


def fine_tuning(folder: pathlib.Path, **changes):
  """A config that takes model and tokenizer from `folder`."""
  paths = {
    split: str(folder.parent / f"{split}.jsonl")
    for split in ("train", "validation", "test")
  }
  base = dict(
    seed=1,
    init_from=dict(path=str(folder)),
    model=dict(dropout_rate=0.0),  # the rest is the folder's
    data=dict(
      name="task",
      task=dict(
        name="classification",
        labels=list(_LABELS),
        metrics=["accuracy", "macro_f1"],
        source=dict(name="jsonl", paths=paths),
      ),
      seq_len=24,
      batch_size=16,
    ),
    optim=dict(
      name="adamw",
      learning_rate=5e-3,
      clip_norm=1.0,
      schedule=dict(name="linear", warmup=0.1),
    ),
    stop=dict(epochs=20),
    evals=dict(dev=dict(name="task_metrics", every_epochs=8)),
    every=dict(log=9, checkpoint=36),
    samples=_TEXTS[:2],
    writers=("csv",),
  )
  return merge(base, changes)


class FineTuningTestCase(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.pretrained = pretrained()
    cls.root = cls.pretrained.parent

  def config(self, **changes):
    return fine_tuning(self.pretrained, **changes)


class EndToEndTest(FineTuningTestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.workdir = cls.root / "tuned"
    cls.result = train.train(fine_tuning(cls.pretrained), cls.workdir)
    cls.model = loading.load_model(cls.workdir)

  def test_two_topics_are_learned(self):
    self.assertEqual(self.result.step, 90)  # 20 epochs of 72 rows by 16
    self.assertGreater(self.result.metrics["dev/accuracy"], 0.95)
    self.assertLess(self.result.metrics["dev/majority_accuracy"], 0.85)
    with (self.workdir / "metrics.csv").open() as file:
      evaluated = [
        int(float(row["step"]))
        for row in csv.DictReader(file)
        if row["dev/accuracy"]
      ]
    self.assertEqual(evaluated, [36, 72, 90])  # 8 epochs, 16, the end

  def test_the_workdir_says_what_was_left_open(self):
    config = json.loads((self.workdir / "config.json").read_text())
    self.assertEqual(config["objective"]["labels"], list(_LABELS))
    self.assertEqual(config["model"]["emb_dim"], 16)
    self.assertEqual(config["model"]["dropout_rate"], 0.0)
    self.assertEqual(config["stop"], {"steps": 90})
    before = loading.load_model(self.pretrained).tokenizer
    self.assertEqual(before.fingerprint(), self.model.tokenizer.fingerprint())

  def test_the_report_speaks_of_classes(self):
    report = (self.workdir / "report" / "report.md").read_text()
    self.assertRegex(report, r"class shares \| bread \d\d\.\d%, ")
    self.assertIn("dev/majority_accuracy (baseline)", report)
    self.assertIn("rows that were cut | 0.0%", report)
    self.assertRegex(report, r"burns every day \. \| bread \(")
    self.assertNotIn("masking", report)

  def test_evaluation_gives_what_training_saw_on_any_split(self):
    found = evaluate.evaluate(
      self.workdir, split="validation", evaluators=["task_metrics"]
    )
    for name in ("accuracy", "macro_f1", "majority_accuracy"):
      self.assertAlmostEqual(
        found[name], self.result.metrics[f"dev/{name}"], places=6
      )
    lines = (self.root / "test.jsonl").read_text().splitlines()
    records = list(map(json.loads, lines))
    said = predict.classify(self.model, [r["text"] for r in records])
    right = [s["label"] == r["label"] for s, r in zip(said, records)]
    test = evaluate.evaluate(
      self.workdir, split="test", evaluators=["task_metrics"]
    )
    self.assertAlmostEqual(test["accuracy"], np.mean(right), places=6)

  def test_what_two_evaluators_measure_is_told_apart(self):
    found = evaluate.evaluate(self.workdir, split="validation")
    want = self.result.metrics["dev/accuracy"]
    for evaluator in ("task_metrics", "objective"):
      self.assertAlmostEqual(found[f"{evaluator}/accuracy"], want, places=6)
    self.assertNotIn("accuracy", found)
    self.assertContainsSubset(
      ("macro_f1", "majority_accuracy", "classification_loss"), found
    )

  def test_all_rows_of_a_task_are_read_unless_fewer_are_asked_for(self):
    loss, whole, part = (
      evaluate.evaluate(
        self.workdir,
        split="train",  # 72 rows
        evaluators=["objective"],
        num_batches=num_batches,
        data=dict(batch_size=1),
      )["classification_loss"]
      for num_batches in (None, 0, 50)
    )
    self.assertEqual(loss, whole)
    self.assertNotEqual(loss, part)

  def test_evaluation_needs_no_split_but_its_own(self):
    paths = {"mine": str(self.root / "test.jsonl")}
    task = self.model.config["data"]["task"]
    task = task | dict(source=dict(name="jsonl", paths=paths))
    alone = evaluate.evaluate(self.workdir, split="mine", data=dict(task=task))
    want = evaluate.evaluate(self.workdir, split="test")
    self.assertContainsSubset(alone, want)
    self.assertNotIn("majority_accuracy", alone)

  def test_the_exported_model_says_the_same_in_transformers(self):
    folder = self.root / "exported"
    convert.convert(self.workdir, folder, format="huggingface")
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(
      folder
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
      inputs = tokenizer(list(_TEXTS), padding=True, return_tensors="pt")
      want = torch.softmax(theirs(**inputs).logits, -1).numpy()
    for model in (self.model, loading.load_model(folder)):
      said = predict.classify(model, _TEXTS)
      found = [list(s["probabilities"].values()) for s in said]
      np.testing.assert_allclose(found, want, atol=1e-4)
      for one, row in zip(said, want):
        self.assertEqual(one["label"], theirs.config.id2label[row.argmax()])

  def test_it_selects_from_a_source(self):
    source = dict(
      name="jsonl",
      paths=str(self.root / "test.jsonl"),
      select=dict(
        keep="bottom",
        count=4,
        scorer=dict(name="classifier", path=str(self.workdir), label="bread"),
      ),
    )
    built = registry.build(SOURCES, source, "data.source")
    found = [e["text"] for e in built.examples("train")]
    lines = (self.root / "test.jsonl").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    said = predict.classify(self.model, texts)
    scores = {
      t: s["probabilities"]["bread"] for t, s in zip(texts, said, strict=True)
    }
    self.assertLen(found, 4)
    self.assertEqual(set(found), set(sorted(texts, key=scores.get)[:4]))
    source["select"]["scorer"]["label"] = "cake"
    with self.assertRaisesRegex(ValueError, "'cake' is no class of .*bread"):
      registry.build(SOURCES, source, "data.source")

  def test_a_run_in_two_parts_is_the_whole_run(self):
    workdir = self.root / "parts"
    stage = settings(self.config(samples=()))
    train.run(stage, workdir, limit=50)
    again = train.run(stage, workdir)
    jax.tree.map(
      np.testing.assert_array_equal,
      self.result.state.params,
      again.state.params,
    )

  def test_the_command_answers_in_json_lines(self):
    file = self.root / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": t}) for t in _TEXTS))
    done = subprocess.run(
      [sys.executable, "-m", "bertjax.predict", "classify",
       f"--model={self.workdir}", f"--file={file}"],
      cwd=_ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
    )  # fmt: skip
    self.assertEqual(done.returncode, 0, done.stderr)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    self.assertEqual([x["text"] for x in lines], list(_TEXTS))
    want = predict.classify(self.model, _TEXTS)
    self.assertEqual([x["label"] for x in lines], [x["label"] for x in want])


class HandoverTest(FineTuningTestCase):
  def start(self, **changes):
    built = experiment.build(settings(self.config(**changes)))
    return initial_state(built).params, built.init().params

  def test_all_but_the_head_is_taken_or_begins_afresh_as_asked(self):
    reinit = dict(top_k=1, parameters=["^encoder/embeddings/norm/"])
    found, fresh = self.start(init_from=dict(reinit=reinit))
    old, _ = load_params(self.pretrained)
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(found["pooler"], old["pooler"])
    same(found["classifier"], fresh["classifier"])
    self.assertEqual(set(found), {"encoder", "pooler", "classifier"})
    now, new, was = (tree["encoder"] for tree in (found, fresh, old))
    same(now["embeddings"]["token"], was["embeddings"]["token"])
    same(now["embeddings"]["norm"], new["embeddings"]["norm"])
    for layer, origin in enumerate((was, new)):
      same(*(jax.tree.map(lambda x, i=layer: x[i], tree["layers"])
             for tree in (now, origin)))  # fmt: skip

  @parameterized.parameters("subword_mean", "mean", "random")
  def test_new_pieces_get_rows_and_old_ones_keep_theirs(self, start):
    tokenizer = dict(name="extended", append=["dogcat"], pad_to_multiple=8)
    found, fresh = self.start(
      init_from=dict(new_rows=start), data=dict(tokenizer=tokenizer)
    )
    table, new, old = (
      np.asarray(params["encoder"]["embeddings"]["token"]["embedding"])
      for params in (found, fresh, load_params(self.pretrained)[0])
    )
    count = len(old)
    self.assertEqual(len(table), -(-(count + 1) // 8) * 8)
    np.testing.assert_array_equal(table[:count], old)
    before = loading.load_model(self.pretrained).tokenizer
    want = {
      "random": new[count],
      "mean": old.mean(0),
      "subword_mean": old[before.encode("dogcat")].mean(0),
    }[start]
    np.testing.assert_allclose(table[count], want, atol=1e-7)

  def test_a_head_that_no_table_knows_is_not_dropped_silently(self):
    model = loading.load_model(self.pretrained)
    odd = dataclasses.replace(
      model, params={**model.params, "odd": {"bias": np.ones(3, np.float32)}}
    )
    convert.write_workdir(odd, self.root / "odd", "float32")
    with self.assertRaisesRegex(ValueError, "this model has no odd/bias"):
      self.start(init_from=dict(path=str(self.root / "odd")))

  @parameterized.named_parameters(
    (
      "another_shape",
      dict(model=dict(mlp_dim=40)),
      "pretrained does not explain .*mlp/",
    ),
    (
      "more_pieces",
      dict(data=dict(tokenizer=dict(name="extended", append=["dogcat"]))),
      "vocabulary has 96 rows, this model's 97 .*init_from.new_rows",
    ),
    (
      "another_vocabulary",
      dict(
        init_from=dict(new_rows="mean"),
        data=dict(tokenizer=dict(name="vocab_file", path="VOCAB")),
      ),
      "id 5 is 'dog' in data.tokenizer but .* must keep their ids",
    ),
    (
      "start",
      dict(init_from=dict(new_rows="median")),
      "init_from.new_rows='median' is unknown; choose from mean, random",
    ),
    (
      "nothing_new",
      dict(init_from=dict(new_rows="mean")),
      "init_from.new_rows: data.tokenizer has no piece that the model lacks",
    ),
    (
      "too_many_layers",
      dict(init_from=dict(reinit=dict(top_k=3))),
      "reinit.top_k=3 must lie between 0 and the 2 layers",
    ),
    (
      "another_objective",
      dict(objective=dict(name="span_qa")),
      "objective.name='span_qa' does not fit data.task, .*'classification'",
    ),
    (
      "other_classes",
      dict(objective=dict(num_classes=3)),
      "num_classes=3 does not fit data.task, which needs 2",
    ),
    (
      "both_paces",
      dict(evals=dict(dev=dict(every=3))),
      "evals.dev has both every",
    ),
    (
      "no_length",
      dict(stop=dict(epochs=None, wall_clock_s=9)),
      "stop.steps or stop.epochs",
    ),
  )
  def test_what_does_not_fit_is_one_clear_message(self, changes, message):
    vocabulary = self.root / "vocab.txt"
    vocabulary.write_text(
      "[PAD] [UNK] [CLS] [SEP] [MASK] dog cat".replace(" ", "\n")
    )
    changes = json.loads(json.dumps(changes).replace("VOCAB", str(vocabulary)))
    with self.assertRaisesRegex(ValueError, message):
      self.start(**changes)


class PreprocessTest(FineTuningTestCase):
  """What texts go through in training they go through ever after."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    # A model that was pre-trained on texts without @names.
    cls.origin = cls.root / "anonymous"
    shutil.copytree(cls.pretrained, cls.origin)
    path = cls.origin / "config.json"
    config = json.loads(path.read_text())
    config["data"]["preprocess"] = [
      dict(name="replace", pattern=r"@\w+", by="the"), "lowercase",
    ]  # fmt: skip
    path.write_text(json.dumps(config))
    cls.enterClassContext(unreported())
    cls.workdir = cls.root / "anonymous_tuned"
    changes = dict(stop=dict(epochs=None, steps=2), evals={}, samples=())
    train.train(
      merge(fine_tuning(cls.pretrained), changes)
      | dict(init_from=dict(path=str(cls.origin)), evals={}),
      cls.workdir,
    )
    cls.models = [loading.load_model(cls.workdir)]
    for number, layout in enumerate(("huggingface", "bertjax")):
      folder = cls.root / f"anonymous_{number}"
      convert.convert(cls.models[-1].path, folder, format=layout)
      cls.models.append(loading.load_model(folder))

  def test_a_stage_takes_them_from_the_one_before(self):
    config = json.loads((self.workdir / "config.json").read_text())
    self.assertLen(config["data"]["preprocess"], 2)

  def test_predictions_apply_them_in_every_layout(self):
    raw, clean = ("@bob DOG barks", "@eve"), ("the dog barks", "the")
    bare = dataclasses.replace(self.models[0], preprocess=())
    for model in self.models:
      # Published folders do not name the attention, whose sums differ.
      np.testing.assert_allclose(
        predict.embed(model, raw), predict.embed(bare, clean), atol=1e-5
      )
      said, want = predict.classify(model, raw), predict.classify(bare, clean)
      self.assertEqual([x["label"] for x in said], [x["label"] for x in want])
    unlike = predict.embed(bare, raw) - predict.embed(bare, clean)
    self.assertGreater(np.abs(unlike).max(), 1e-3)

  def test_evaluation_of_another_source_applies_them(self):
    lines = (self.root / "test.jsonl").read_text()
    for name, text in (
      ("raw", lines.replace("the ", "@bob ").upper().replace('"TEXT"', '"text"')
       .replace('"LABEL"', '"label"').replace('"ANIMAL"', '"animal"')
       .replace('"BREAD"', '"bread"')),
      ("clean", lines),
    ):  # fmt: skip
      (self.root / f"{name}.jsonl").write_text(text)
    task = self.config()["data"]["task"]
    found = [
      evaluate.evaluate(
        self.workdir,
        split="test",
        evaluators=["objective"],
        data=dict(
          task=merge(
            task, dict(source=dict(paths=dict(test=str(self.root / name))))
          )
        ),
      )
      for name in ("raw.jsonl", "clean.jsonl")
    ]
    self.assertEqual(*found)

  def test_spans_of_characters_are_refused(self):
    data = dict(
      name="task",
      preprocess=["lowercase"],
      task=dict(
        name="squad",
        source=dict(name="jsonl", paths=str(self.root / "*.jsonl")),
      ),
    )
    config = self.config() | {"data": merge(self.config()["data"], data)}
    with self.assertRaisesRegex(ValueError, "data.preprocess would move"):
      experiment.build(settings(config))


class SelectionTest(FineTuningTestCase):
  """Early stopping, the best checkpoint, grids, and runs that break.

  The worst loss is what is looked for: it is sure to come first.
  """

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.enterClassContext(unreported())
    worst = "dev/classification_loss"
    changes = dict(
      samples=(),
      stop=dict(
        epochs=None,
        steps=20,
        early=dict(metric=worst, patience=3, mode="max"),
      ),
      keep=dict(keep=1, best_metric=worst, best_mode="max"),
      every=dict(log=1, checkpoint=4),
      optim=dict(learning_rate=1e-3),
    )
    cls.changed = merge(fine_tuning(cls.pretrained), changes)
    cls.changed["evals"] = dict(
      dev=dict(name="objective", every=3), test=dict(name="task_metrics"),
    )  # fmt: skip
    cls.workdir = cls.root / "selected"
    train.train(cls.changed, cls.workdir)

  def test_the_run_ends_after_the_evaluations_that_brought_nothing(self):
    rows = processes.rows(self.workdir)
    self.assertEqual(int(float(rows[-1]["step"])), 12)  # 3, then 6, 9, 12

  def test_the_best_checkpoint_stays_and_is_what_readers_get(self):
    folder = self.workdir / "checkpoints"
    self.assertEqual({p.name for p in folder.iterdir()}, {"3", "12"})
    best, last = (load_params(self.workdir, step)[0] for step in (3, 12))
    by_default, _ = load_params(self.workdir)
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(by_default, best)
    same(
      jax.tree.map(np.asarray, loading.load_model(self.workdir).params), best
    )
    self.assertFalse(
      np.array_equal(best["classifier"]["bias"], last["classifier"]["bias"])
    )
    start = experiment.build(
      settings(self.config(init_from=dict(path=str(self.workdir))))
    )
    same(initial_state(start).params["pooler"], best["pooler"])

  def test_a_run_that_broke_becomes_the_same_run(self):
    workdir = self.root / "broken"
    # The best was at 3, the last checkpoint at 4, an evaluation at 6.
    with breaking_at(7), self.assertRaisesRegex(OSError, "power"):
      train.train(self.changed, workdir)
    self.assertEqual(int(float(processes.rows(workdir)[-1]["step"])), 7)
    train.train(self.changed, workdir)
    self.assertEqual(processes.values(workdir), processes.values(self.workdir))
    for step in (3, 12):
      jax.tree.map(
        np.testing.assert_array_equal,
        load_params(workdir, step)[0],
        load_params(self.workdir, step)[0],
      )

  def test_a_grid_runs_every_combination_and_names_the_best(self):
    grid = dict(optim=dict(learning_rate=[1e-9, 3e-2]), seed=[1])
    config = self.changed | dict(
      grid=grid,
      stop=dict(steps=6),
      keep=dict(best_metric="dev/classification_loss", best_mode="min"),
      every=dict(log=6, checkpoint=6),
    )
    workdir = self.root / "grid"
    result = train.train(config, workdir)
    with (workdir / "grid.csv").open() as file:
      rows = list(csv.DictReader(file))
    self.assertEqual(
      [(r["optim.learning_rate"], r["seed"]) for r in rows],
      [("1e-09", "1"), ("0.03", "1")],
    )
    losses = [float(r["dev/classification_loss"]) for r in rows]
    self.assertEqual([r["best"] for r in rows].index("1"), np.argmin(losses))
    self.assertEqual(np.argmin(losses), 1)  # the rate that learns
    self.assertAlmostEqual(
      result.metrics["dev/classification_loss"], min(losses), places=6
    )
    self.assertIn("test/accuracy", result.metrics)
    best = loading.load_model(workdir)
    self.assertEqual(best.config["optim"]["learning_rate"], 0.03)

  @parameterized.named_parameters(
    (
      "no_list",
      dict(grid=dict(seed=3)),
      "grid.seed=3 must be a list of the values to try",
    ),
    (
      "no_metric",
      dict(grid=dict(seed=[3]), keep=dict(best_metric=None)),
      "grid: keep.best_metric is required",
    ),
    (
      "twice",
      dict(grid=dict(seed=[3, 3])),
      "grid: two combinations are called 'seed=3'; remove one",
    ),
    (
      "never_evaluated",
      dict(keep=dict(best_metric="test/accuracy")),
      "evals.test.every must be set: keep.best_metric='test/accuracy'",
    ),
    (
      "unknown_metric",
      dict(keep=dict(best_metric="dev/accuracie"), stop=dict(early=None)),
      "keep.best_metric='dev/accuracie' is not reported; .*dev/accuracy",
    ),
  )
  def test_what_cannot_be_selected_by_is_refused(self, changes, message):
    config = merge(self.changed, changes)
    with self.assertRaisesRegex(ValueError, message):
      train.train(config, pathlib.Path(self.create_tempdir()))


class StagesTest(FineTuningTestCase):
  def test_pre_training_hands_over_to_a_task(self):
    tuning = self.config(stop=dict(epochs=1))
    config = tiny.config(self.root, stop=dict(steps=2)) | dict(
      evals={},
      stages=dict(
        pretrain={},
        tune=dict(
          init_from={}, objective=dict(name="classification"),
          **{k: tuning[k] for k in ("data", "stop", "evals")},
        ),
      )
    )  # fmt: skip
    with unreported():
      result = train.train(config, self.root / "staged")
    self.assertEqual(result.step, 2)  # stop.steps=2 comes before the epoch
    self.assertIn("dev/macro_f1", result.metrics)


if __name__ == "__main__":
  absltest.main()
