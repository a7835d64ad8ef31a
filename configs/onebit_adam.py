r"""1-bit Adam (Tang et al. 2021, arXiv:2102.02888): BERT over slow networks.

Run:   python -m bertjax.train --config=configs/onebit_adam.py:large \
           --workdir=runs/onebit
       base or large; sequences of 128, then of 512 with a warm-up of the
       variance of its own. Workers are `mesh.data`; give the devices of one
       worker, joined by a fast network, to `mesh.fsdp` (or `mesh.model`).
       lamb (1-bit LAMB, Li et al. 2021) and zero_one (0/1 Adam, Lu et al.
       2022): BERT-large, sequences of 128 alone.
Tiny:  --config=configs/onebit_adam.py:tiny   (seconds, no network)
Needs: the corpora of configs/bert.py; a vocab.txt.
Seen:  the tiny variant only; its claims at toy size: experiments/onebit_adam.

Learning rate, batch, clipping and the steps of full precision are those of the
authors' scripts; the length of the second stage and its rate are not published.
Of `lamb` and `zero_one` theirs are batch, rate, bounds, intervals and the steps
in full precision. That the rate warms up as long as those is this project's; so
is the number of steps, that of configs/lamb.py and of `large`.
"""

import ml_collections

from bertjax.config import new_config
from bertjax.registry import lookup

# Steps of sequences of 128, and how many of them in full precision.
STEPS = {
  "base": (118_000, 16_000),
  "large": (152_000, 23_000),
  "lamb": (7_038, 1_000),
  "zero_one": (152_000, 1_000),
}


def get_config(variant: str = "large") -> ml_collections.ConfigDict:
  tiny = variant == "tiny"
  known = STEPS | {"tiny": (4, 2)}
  steps, freeze_step = lookup(known, variant, "configs/onebit_adam.py")
  c = new_config()
  c.seed = 0
  c.dtype = "float32" if tiny else "bfloat16"
  sizes = {"lamb": "large", "zero_one": "large"}
  c.model = dict(name="bert", size=sizes.get(variant, variant))
  c.objective = dict(name="masked_lm", pair_task="nsp")
  c.data = dict(
    source=dict(
      name="mixture",
      sources=(
        dict(name="corpus", corpus="wikipedia"),
        dict(name="corpus", corpus="books", data_dir="books"),
      ),
    ),
    tokenizer=dict(name="vocab_file", path="vocab.txt"),
    splitter="sentences",
    seq_len=128,
    batch_size=4096,
    instances=dict(name="nsp"),
    masking=dict(rate=0.15, max_masked=20),
  )
  c.optim = dict(
    name="onebit_adam",
    learning_rate=4e-4,
    eps=1e-8,
    weight_decay=0.01,
    bias_correction=False,
    clip_norm=1.0,
    freeze_step=freeze_step,
    schedule=dict(name="staircase", warmup=12_500, every=520, factor=0.99),
  )
  c.stop = dict(steps=steps)
  c.evals = dict(heldout=dict(name="objective", num_batches=4, every=2_000))
  c.every = dict(log=50, checkpoint=2_000)
  c.stages = dict(
    phase1=dict(),
    phase2=dict(
      stop=dict(steps=10_000),
      data=dict(seq_len=512, masking=dict(max_masked=77)),
      optim=dict(freeze_step=1_500, schedule=dict(warmup=1_000)),
      init_from=dict(carry="optimizer", reset_schedule=True),
    ),
  )
  if variant in sizes:
    del c.stages
    return _lamb(c) if variant == "lamb" else _zero_one(c)
  if tiny:
    c.data.source = dict(name="python_docs")
    c.data.tokenizer = dict(name="train", kind="wordpiece", vocab_size=2048)
    c.data.update(seq_len=64, batch_size=16)
    c.optim.schedule.update(warmup=1, every=1)
    c.evals.heldout.update(num_batches=2, every=2)
    c.every = dict(log=1, checkpoint=2)
    c.stages.phase2.stop.steps = 4
    c.stages.phase2.data.update(seq_len=128, masking=dict(max_masked=20))
    c.stages.phase2.optim = dict(freeze_step=2, schedule=dict(warmup=1))
  return c


def _lamb(c):
  c.data.batch_size = 65_536
  c.microbatches = 16
  c.optim = dict(
    name="onebit_lamb",
    learning_rate=11e-3,
    weight_decay=0.01,
    bias_correction=False,
    trust_clip=(0.01, 0.3),
    clip_norm=1.0,
    freeze_step=1_000,
    schedule=dict(name="polynomial", warmup=1_000),
  )
  c.evals.heldout.every = 200
  c.every = dict(log=10, checkpoint=200)
  return c


def _zero_one(c):
  c.optim = dict(
    name="zero_one_adam",
    learning_rate=1e-3,
    weight_decay=0.01,
    clip_norm=1.0,
    freeze_step=1_000,
    variance_updates=16,
    local_step_scaler=1_000,
    local_step_clipper=16,
    schedule=dict(name="staircase", warmup=1_000, every=520, factor=0.99),
  )
  return c
