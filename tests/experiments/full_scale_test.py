"""What experiments would do at full scale, training and TPUs left out."""

import csv
import dataclasses
import json
import os
import pathlib
import types
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest

from bertjax import hardware, train
from bertjax.config import settings
from bertjax.planning import step
from bertjax.records import write_json
from experiments import command, outcome
from experiments.bert import run as bert
from experiments.flash_attention import run as flash_attention
from experiments.lamb import run as lamb
from experiments.mkor import run as mkor
from experiments.onebit_adam import run as onebit_adam
from experiments.onebit_adam import variance, wires
from experiments.point_bert import findings, pictures
from experiments.point_bert import run as point_bert

# More of them than a run of this name has.
_METRICS = (
  "loss",
  "second_order",
  "test/accuracy",
  "probe/accuracy",
  *(
    f"heldout/{name}"
    for name in (
      "accuracy", "cd_l2", "class_miou", "code_perplexity", "code_usage",
      "f_score", "fine_l1", "frequent_code_share", "instance_miou",
      "mixed_tokens_accuracy", "mlm_accuracy", "mlm_loss", "nsp_accuracy",
      "tokens_accuracy", "unigram_accuracy", "unigram_loss",
    )
  ),
)  # fmt: skip


class Training:
  """Stands in for `train.train`: builds what it would train, on no data.

  Attributes:
    built: how many configs, those that differ in seed or rows alone once.
  """

  def __init__(self):
    self._known, self._rng = set(), np.random.default_rng(0)

  @property
  def built(self):
    return len(self._known)

  def __call__(self, config, workdir):
    (workdir / "checkpoints").mkdir(parents=True)
    write_json(workdir / "config.json", config)  # for runs that begin with it
    same = config | {"seed": 0, "data": _without(config["data"], "few_shot")}
    known = json.dumps(same, sort_keys=True, default=str)
    if known not in self._known:
      self._known.add(known)
      _build(settings(config))
    curve = self._rng.uniform(0.1, 0.9, (20, len(_METRICS)))
    with open(workdir / "metrics.csv", "w", encoding="utf-8") as file:
      rows = csv.writer(file)
      rows.writerow(("step", *_METRICS))
      last = config["stop"]["steps"]
      steps = np.linspace(1, last, num=20).astype(int)
      rows.writerows((int(at), *row) for at, row in zip(steps, curve))
    metrics = dict(zip(_METRICS, curve[-1]))
    return train.Result(None, last, "done", metrics, elapsed_s=1.0)


def _build(stage):
  text = stage.data.get("name") != "points"
  of_libraries = stage.data.get("source", {}).get("name") == "furniture"
  if of_libraries and stage.objective["name"] == "point_classification":
    # They are counted where there is a library.
    ways = stage.data.get("few_shot", {}).get("ways", 10)
    objective = dict(stage.objective) | {"num_classes": ways}
    stage = dataclasses.replace(stage, objective=objective)
  step.build(jax.devices(), settings=stage, vocab_size=512 if text else None)


def _without(fields, name):
  return {k: v for k, v in fields.items() if k != name}


def pod(folder, topology, size):
  """A row of `wires.measure`."""
  del folder
  sent = {"sent bytes": 1.0, "formula bytes": 1.0, "ring bytes": 16.0}
  row = {"arm": topology, "model": size, "workers": 16, "seconds": 1.0}
  return row | sent


# Of a program for a TPU.
_MEMORY = types.SimpleNamespace(temporaries=10**6, total=10**7)
_PROGRAM = types.SimpleNamespace(memory=_MEMORY)
_COST = types.SimpleNamespace(cycles=10**6, hbm_bytes=10**8)


def norms(*, config):
  """Of `variance.norms`: |v|_1 of gradients that stay as they are."""
  steps = config["stop"]["steps"]
  b2 = config["optim"]["b2"]
  return dict(
    norms=[1 - b2**t for t in range(1, steps + 1)], rates=[1.0] * (steps + 1)
  )


class FullScaleTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir())
    self.training = Training()
    self.enterContext(mock.patch.object(train, "train", self.training))
    cache = {"BERTJAX_CACHE": str(self.folder / "cache")}
    self.enterContext(mock.patch.dict(os.environ, cache))

  def _run(self, module, **changes):
    """Its full scale, with these changes; what it found."""
    scale = dataclasses.replace(module.SCALES[command.FULL], **changes)
    with mock.patch.dict(module.SCALES, {command.FULL: scale}):
      found = module.run(self.folder / "runs")
    outcome.save(found, self.folder)
    self.assertEqual(sum(found.counts.values()), len(found.rows))
    return found

  def _assert_committed(self, module, found):
    """The claims are those of the committed result."""
    path = pathlib.Path(module.__file__).with_name(outcome.RESULT)
    committed = json.loads(path.read_text(encoding="utf-8"))["claims"]
    self.assertEqual(
      [claim.claim for claim in found.claims], [c["claim"] for c in committed]
    )

  def test_bert(self):
    found = self._run(bert, packages=("absl-py", "grain"), sentences=100)
    self._assert_committed(bert, found)
    self.assertEqual(self.training.built, 1 + 4 + 2 * 2 * 2)

  def test_flash_attention(self):
    for name, value in (("compile_for", _PROGRAM), ("price", _COST)):
      self.enterContext(mock.patch.object(hardware, name, return_value=value))
    found = self._run(
      flash_attention,
      exact=(1, 1, 32, 16),
      memory_lengths=(256, 512),
      crossover_lengths=(16, 32),
      repeats=1,
    )
    self._assert_committed(flash_attention, found)

  def test_lamb(self):
    found = self._run(lamb)
    self._assert_committed(lamb, found)

  def test_mkor(self):
    found = self._run(mkor, widths=(8,), tokens=(128, 2048), repeats=1)
    self._assert_committed(mkor, found)

  def test_onebit_adam(self):
    params = {"w": np.zeros((64, 64))}
    for module, name, value in (
      (wires, "load_params", lambda workdir: (params,)),
      (wires, "measure", pod),
      (variance, "norms", norms),
    ):
      self.enterContext(mock.patch.object(module, name, value))
    self._assert_committed(onebit_adam, self._run(onebit_adam))

  def test_point_bert(self):
    (self.folder / "one.sh3f").touch()
    installed = {"SWEETHOME3D_FURNITURE": str(self.folder)}
    self.enterContext(mock.patch.dict(os.environ, installed))
    draw = [
      self.enterContext(mock.patch.object(pictures, name))
      for name in ("draw_clouds", "draw_features")
    ]
    found = self._run(point_bert)
    self._assert_committed(point_bert, found)
    self.assertEqual(draw[0].call_args.args[1].factors["arm"], findings.BASE)
    self.assertEqual(draw[1].call_count, 2)


if __name__ == "__main__":
  absltest.main()
