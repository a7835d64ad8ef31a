r"""BERT-tiny on generated text: the stand-in of experiments without a corpus.

Run:   python -m bertjax.train --config=configs/grammar.py \
           --workdir=runs/grammar
Tiny:  --config=configs/grammar.py:tiny   (seconds)
Text:  bertjax.data.sources.grammar, 3000 documents of 8 topics.
Seen:  masked accuracy 0.421 on held-out documents, 0.123 by frequency alone;
       next sentence 0.926. `experiments/bert` has more.
"""

import ml_collections

from bertjax.config import new_config


def get_config(variant: str = "") -> ml_collections.ConfigDict:
  if variant not in ("", "tiny"):
    raise ValueError(
      f"configs/grammar.py:{variant} is unknown; there is :tiny."
    )
  tiny = variant == "tiny"
  c = new_config()
  c.seed = 0
  c.model = dict(
    name="bert", size="tiny", max_positions=32, dropout_rate=0.0, scan=False
  )
  c.objective = dict(name="masked_lm", pair_task="nsp")
  c.data = dict(
    source=dict(name="grammar"),
    tokenizer=dict(name="train", kind="wordpiece", vocab_size=1000),
    splitter="lines",
    seq_len=32,
    batch_size=64,
    instances=dict(name="nsp"),
    masking=dict(rate=0.15),
  )
  c.optim = dict(
    name="adamw",
    learning_rate=2e-3,
    schedule=dict(name="linear", warmup=0.1),
    weight_decay=0.01,
    clip_norm=1.0,
  )
  c.stop = dict(steps=900)
  c.evals = dict(heldout=dict(name="objective", every=100))
  c.every = dict(log=20, checkpoint=100)
  c.writers = ("csv",)
  if tiny:
    c.model.num_layers, c.model.emb_dim = 1, 32
    c.data.source.documents = dict(train=64, validation=16, test=16)
    c.stop.steps = 8
    c.evals.heldout.every = 4
    c.every = dict(log=2, checkpoint=4)
  return c
