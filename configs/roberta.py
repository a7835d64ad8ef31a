r"""RoBERTa pre-training (Liu et al. 2019, arXiv:1907.11692).

Run:   python -m bertjax.train --config=configs/roberta.py:base \
           --workdir=runs/roberta
Tiny:  --config=configs/roberta.py:tiny   (seconds, no network)
Needs: `openwebtext` prepared as the table bertjax.data.sources.CORPORA says.
Seen:  the tiny variant only; nobody here has the corpus or a TPU.

Masked tokens only, full sentences of 512 tokens, byte-level BPE of 50k, masks
drawn afresh in every epoch, batches of 8k sequences.
"""

import ml_collections

from bertjax.config import new_config
from bertjax.models.bert import SIZES
from bertjax.registry import lookup


def get_config(variant: str = "base") -> ml_collections.ConfigDict:
  lookup(SIZES, variant, "configs/roberta.py")
  tiny = variant == "tiny"
  large = variant == "large"
  c = new_config()
  c.seed = 0
  c.dtype = "float32" if tiny else "bfloat16"
  c.model = dict(name="roberta", size="tiny" if tiny else variant)
  c.objective = dict(name="masked_lm")
  c.data = dict(
    source=dict(name="corpus", corpus="openwebtext", data_dir="openwebtext"),
    tokenizer=dict(name="train", kind="byte_bpe", vocab_size=50_265),
    splitter="sentences",
    seq_len=512,
    batch_size=8192,
    instances=dict(name="full_sentences"),
    masking=dict(rate=0.15),
  )
  c.microbatches = 16
  c.optim = dict(
    name="adamw",
    learning_rate=4e-4 if large else 6e-4,
    b2=0.98,
    eps=1e-6,
    weight_decay=0.01,
    schedule=dict(name="linear", warmup=30_000 if large else 24_000),
  )
  c.stop = dict(steps=500_000)
  c.evals = dict(heldout=dict(name="objective", num_batches=4, every=2_000))
  c.every = dict(log=50, checkpoint=1_000)
  if tiny:
    c.data.source = dict(name="python_docs")
    c.data.tokenizer.vocab_size = 2048
    c.data.seq_len = 64
    c.data.batch_size = 8
    c.microbatches = 2
    c.optim.schedule.warmup = 2
    c.stop.steps = 4
    c.evals.heldout.num_batches = 2
    c.every = dict(log=1, checkpoint=2)
  return c
