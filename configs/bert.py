r"""BERT pre-training, phases 1 and 2 (Devlin et al. 2018, arXiv:1810.04805).

Run:   python -m bertjax.train --config=configs/bert.py:base --workdir=runs/bert
       sizes: mini small medium base large; the paper has base and large.
Tiny:  --config=configs/bert.py:tiny   (seconds, no network)
Needs: `wikipedia` and a folder of books, one text file each, prepared as the
       table bertjax.data.sources.CORPORA says; a vocab.txt.
Seen:  the tiny variant only; nobody here has the corpora or a TPU.

Masked tokens and next sentence, 1M steps of 256 sequences: 900k at length 128,
then 100k at 512 that go on with optimizer and schedule.
"""

import ml_collections

from bertjax.config import new_config
from bertjax.models.bert import SIZES
from bertjax.registry import lookup


def get_config(variant: str = "base") -> ml_collections.ConfigDict:
  lookup(SIZES, variant, "configs/bert.py")
  tiny = variant == "tiny"
  c = new_config()
  c.seed = 0
  c.dtype = "float32" if tiny else "bfloat16"
  c.model = dict(name="bert", size="tiny" if tiny else variant)
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
    batch_size=256,
    instances=dict(name="nsp", short_seq_prob=0.1),
    masking=dict(rate=0.15, max_masked=20),
  )
  c.optim = dict(
    name="adamw",
    learning_rate=1e-4,
    bias_correction=False,
    eps=1e-6,
    weight_decay=0.01,
    clip_norm=1.0,
    schedule=dict(name="linear_reference", warmup=10_000),
  )
  c.horizon = 1_000_000
  c.stop = dict(steps=900_000)
  c.evals = dict(heldout=dict(name="objective", num_batches=40, every=10_000))
  c.every = dict(log=100, checkpoint=5_000)
  c.stages = dict(
    phase1=dict(stop=dict(steps=900_000)),
    phase2=dict(
      stop=dict(steps=1_000_000),
      data=dict(seq_len=512, masking=dict(max_masked=77)),
      init_from=dict(carry="optimizer", reset_schedule=False),
    ),
  )
  if tiny:
    c.data.source = dict(name="python_docs")
    c.data.tokenizer = dict(name="train", kind="wordpiece", vocab_size=2048)
    c.data.batch_size = 8
    c.data.seq_len = 64
    c.optim.schedule.warmup = 2
    c.horizon = 8
    c.stop.steps = 4
    c.evals.heldout.num_batches = 2
    c.every = dict(log=1, checkpoint=2)
    c.stages.phase1.stop.steps = 4
    c.stages.phase2.stop.steps = 8
    c.stages.phase2.data.seq_len = 128
    c.stages.phase2.data.masking.max_masked = 20
  return c
