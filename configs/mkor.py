r"""MKOR and MKOR-H (Mozaffari et al. 2023, arXiv:2306.01685): BERT's phase 2.

Run:   python -m bertjax.train --config=configs/mkor.py --workdir=runs/mkor \
           --config.init_from.path=runs/lamb/phase1
       mkor_h hands over to LAMB alone once curvature buys little; also kaisa,
       eva, lamb: what the paper compares with. All continue BERT-large from
       the phase 1 of configs/lamb.py.
Tiny:  --config=configs/mkor.py:tiny   (seconds, no network)
Needs: the corpora of configs/bert.py; a vocab.txt; a first phase.
Seen:  the tiny variant only; its claims at toy size: experiments/mkor.

Rates, batch and steps are LAMB's, the refresh every 10 steps, decay 0.95 and
half-precision factors those of the authors' code, and so is the rule: the
paper prints another (see bertjax.optim.preconditioning.inverse_factor).
The steps are those after which the paper evaluates.
"""

import ml_collections

from bertjax.config import new_config
from bertjax.registry import lookup

# Steps, and what stands before LAMB.
VARIANTS = {
  "mkor": (1_000, dict(name="mkor", rule="reference")),
  "mkor_h": (600, dict(name="mkor", rule="reference", switch=dict())),
  # Memory-optimal, as on the paper's BERT.
  "kaisa": (1_000, dict(name="kfac", form="eigen", grad_worker_fraction=0.0)),
  "eva": (1_000, dict(name="eva")),
  "lamb": (1_563, None),
  "tiny": (4, dict(name="mkor", rule="reference", interval=2)),
}


def get_config(variant: str = "mkor") -> ml_collections.ConfigDict:
  tiny = variant == "tiny"
  steps, precondition = lookup(VARIANTS, variant, "configs/mkor.py")
  c = new_config()
  c.seed = 0
  c.dtype = "float32" if tiny else "bfloat16"
  c.model = dict(name="bert", size="tiny" if tiny else "large")
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
    seq_len=512,
    batch_size=32_768,
    instances=dict(name="nsp"),
    masking=dict(rate=0.15, max_masked=80),
  )
  c.microbatches = 1 if tiny else 16
  c.optim = dict(
    name="lamb",
    learning_rate=4e-3,
    weight_decay=0.01,
    pre_norm="clip",
    skip_undecayed=True,
    schedule=dict(name="polynomial_reference", warmup=0.128, power=0.5),
  )
  if precondition is not None:
    c.optim.precondition = precondition
  c.stop = dict(steps=steps)
  c.evals = dict(heldout=dict(name="objective", num_batches=1, every=100))
  c.every = dict(log=10, checkpoint=100)
  if not tiny:
    c.init_from = dict(path="phase1")
    return c
  c.data.source = dict(name="python_docs")
  c.data.tokenizer = dict(name="train", kind="wordpiece", vocab_size=2048)
  c.data.update(seq_len=64, batch_size=16, masking=dict(max_masked=10))
  c.evals.heldout.every = 2
  c.every = dict(log=1, checkpoint=2)
  return c
