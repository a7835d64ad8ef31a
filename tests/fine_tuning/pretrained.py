"""A short pre-training, and a task beside it to fine-tune it on."""

import atexit
import functools
import json
import pathlib
import random
import tempfile
from unittest import mock

from absl.testing import parameterized

from bertjax import train
from bertjax.config import merge
from tests import tiny

LABELS = ("animal", "bread")
TEXTS = ("the loaf of room 3 burns every day .", "the dog barks .", "oven")


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
      lines.append(json.dumps({"text": text, "label": LABELS[label]}))
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
        labels=list(LABELS),
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
    samples=TEXTS[:2],
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
