r"""A small BERT on real text, in minutes on two CPU cores, without network.

Run:   python -m bertjax.train --config=configs/quickstart.py \
           --workdir=runs/quickstart
Tiny:  --config=configs/quickstart.py:tiny   (seconds)
Text:  the documentation and docstrings of the installed Python packages.
Seen:  2,000 steps in 4 minutes on two AMD cores (19,500 tokens/s): masked
       accuracy 0.150 on unseen packages, guessing by frequency 0.063; loss
       7.5 -> 5.5, still falling. quickstart_reference.csv is that run's curve,
       which the report compares with.
"""

import pathlib

import ml_collections

from bertjax.config import new_config

_REFERENCE = pathlib.Path(__file__).with_name("quickstart_reference.csv")


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  if variant not in ("", "tiny"):
    raise ValueError(
      f"configs/quickstart.py:{variant} is unknown; there is :tiny."
    )
  tiny = variant == "tiny"
  c = new_config()
  c.seed = 0
  c.dtype = "float32" if tiny else "bfloat16"
  c.model = dict(
    name="bert", size="tiny" if tiny else "mini", num_layers=2, scan=tiny
  )
  c.objective = dict(name="masked_lm")
  c.data = dict(
    source=dict(name="python_docs"),
    tokenizer=dict(name="train", kind="wordpiece", vocab_size=4096),
    splitter="sentences",
    seq_len=64,
    batch_size=16 if tiny else 32,
    instances=dict(name="packed"),
    masking=dict(rate=0.15, unit="token"),
  )
  c.optim = dict(
    name="adamw",
    learning_rate=2e-3,
    schedule=dict(name="linear", warmup=0.1),
    weight_decay=0.01,
    clip_norm=3.0,
  )
  c.stop = dict(steps=8 if tiny else 2000, wall_clock_s=285)
  c.evals = dict(
    heldout=dict(
      name="objective",
      split="test",
      num_batches=2 if tiny else 40,
      every=4 if tiny else 500,
    )
  )
  c.every = dict(log=2 if tiny else 50, checkpoint=4 if tiny else 500)
  c.reference_curve = "" if tiny else str(_REFERENCE)
  c.samples = (
    "Return a new [MASK] with the given shape and dtype.",
    "If the file does not [MASK], an error is raised.",
    "The default [MASK] is None.",
  )
  return c
