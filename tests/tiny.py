"""A tiny corpus and config, so that whole runs take seconds."""

import pathlib
import tempfile
from typing import Any

import numpy as np
from absl.testing import parameterized

from bertjax.config import merge

TOPICS = (
  ("cat", "dog", "horse", "purrs", "barks", "runs", "sleeps"),
  ("ship", "sailor", "harbour", "sails", "sinks", "anchors", "drifts"),
  ("loaf", "oven", "baker", "rises", "burns", "cools", "bakes"),
)


def write_corpus(folder: pathlib.Path, documents: int = 60) -> pathlib.Path:
  """A file in BERT's format: a sentence a line, a blank line per document."""
  rng = np.random.default_rng(0)
  texts = []
  for number in range(documents):
    words = TOPICS[number % len(TOPICS)]
    lines = []
    for _ in range(6):
      noun, verb = rng.choice(words[:3]), rng.choice(words[3:])
      lines.append(f"the {noun} of room {rng.integers(30)} {verb} every day .")
    texts.append("\n".join(lines))
  path = folder / "corpus.txt"
  path.write_text("\n\n".join(texts) + "\n")
  return path


def config(folder: pathlib.Path, **changes: Any) -> dict[str, Any]:
  """A run of 6 steps on the corpus in `folder`; `changes` are merged in."""
  base = dict(
    seed=3,
    model=dict(
      name="bert",
      num_layers=2,
      emb_dim=16,
      num_heads=4,
      mlp_dim=24,
      max_positions=32,
      attend="reference",  # others take longer to trace and to compile
    ),
    objective=dict(name="masked_lm", pair_task="nsp"),
    data=dict(
      source=dict(
        name="text_files",
        paths=str(folder / "corpus.txt"),
        documents="blank_line",
        fractions=dict(train=0.7, validation=0.3),
      ),
      tokenizer=dict(name="train", kind="wordpiece", vocab_size=96),
      splitter="lines",
      seq_len=32,
      batch_size=8,
      instances=dict(name="nsp"),
      masking=dict(rate=0.15),
    ),
    optim=dict(name="lamb", learning_rate=1e-2, clip_norm=1.0),
    stop=dict(steps=6),
    evals=dict(heldout=dict(name="objective", every=3, num_batches=2)),
    every=dict(log=1, checkpoint=2),
    writers=("csv",),
    cache_dir=str(folder / "cache"),
  )
  return merge(base, changes)


def small(folder: pathlib.Path, **changes: Any) -> dict[str, Any]:
  """`config` with as little as possible to trace, for runs in processes."""
  less = dict(
    model=dict(num_layers=1, scan=False),
    objective=dict(pair_task=None),
    data=dict(instances=dict(name="packed")),
    optim=dict(name="adamw", learning_rate=1e-2, clip_norm=1.0),
  )
  return config(folder, **merge(less, changes))


class CorpusTestCase(parameterized.TestCase):
  """Tests around runs on one corpus, in the folder `root`."""

  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    write_corpus(cls.root)
