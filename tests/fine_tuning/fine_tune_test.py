"""From pre-training to an exported classifier, as a user goes about it."""

import csv
import dataclasses
import json
import os
import pathlib
import shutil
import subprocess
import sys

import pytest
from absl.testing import absltest

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
  predict,
  registry,
  train,
)
from bertjax.config import merge, settings
from bertjax.data.sources import SOURCES
from tests.fine_tuning.pretrained import (
  LABELS,
  TEXTS,
  FineTuningTestCase,
  fine_tuning,
  unreported,
)

pytestmark = pytest.mark.usefixtures("one_device")

_ROOT = pathlib.Path(__file__).parents[2]


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
    self.assertEqual(config["objective"]["labels"], list(LABELS))
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
      inputs = tokenizer(list(TEXTS), padding=True, return_tensors="pt")
      want = torch.softmax(theirs(**inputs).logits, -1).numpy()
    for model in (self.model, loading.load_model(folder)):
      said = predict.classify(model, TEXTS)
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
    file.write_text("\n".join(json.dumps({"text": t}) for t in TEXTS))
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
    self.assertEqual([x["text"] for x in lines], list(TEXTS))
    want = predict.classify(self.model, TEXTS)
    self.assertEqual([x["label"] for x in lines], [x["label"] for x in want])


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


if __name__ == "__main__":
  absltest.main()
