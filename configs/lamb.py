r"""LAMB: BERT in 76 minutes (You et al. 2020, arXiv:1904.00962), and MLPerf.

Run:   python -m bertjax.train --config=configs/lamb.py --workdir=runs/lamb
       the mixed-batch run: 64k sequences of 128 tokens, then 32k of 512, with
       the moments kept and the schedule begun again.
       sizes as in configs/bert.py; the paper's is large, the default.
       --config=configs/lamb.py:batch_4096
       the paper's table of batches of one size, 512 (batch_512) to 32,768: as
       many sequences in each, nine tenths of the steps with 128 tokens, the
       rest with 512; rate and warm-up by the square-root rule.
       --config=configs/lamb.py:mlperf_448 --config.init_from.path=FOLDER
       the second phase alone, from weights of the first, until masked accuracy
       on 10,000 held-out sequences, or as many more as fill batches, is 0.720;
       also mlperf_768 and the others of `MLPERF` below, up to mlperf_16384.
Tiny:  --config=configs/lamb.py:tiny   (seconds, no network)
Needs: the corpora of configs/bert.py; a vocab.txt. On few devices raise
       `microbatches` until a part of the batch fits.
Seen:  the tiny variant only; nobody here has the corpora or a TPU.

Of the mixed-batch run rates of phases 1 and 2, steps, warm-up and power 0.5 are
those of NVIDIA's scripts, and so is the variant of LAMB: clipped gradient, no
adaptation where nothing decays. The table's runs have the paper's: no clipping,
power 1. Its ratio of warm-up is taken of the steps of each phase.
"""

import ml_collections

from bertjax.config import new_config
from bertjax.models.bert import SIZES
from bertjax.optim import square_root_scaling
from bertjax.registry import lookup

# The paper's batches, and the sequences that each of its runs reads.
BATCHES = (512, 1_024, 2_048, 4_096, 8_192, 16_384, 32_768)
_SEQUENCES = 512_000_000

# MLPerf v2.0 and v2.1 logs by global batch: rate, b1, b2, decay, steps of the
# schedule, warm-up, where on the ramp it starts.
MLPERF = {
  "448": (4e-4, 0.9, 0.999, 0.01, 7_280, 0, 0),
  "768": (9.6e-4, 0.60466, 0.85437, 0.1, 3_680, 0, 0),
  "1536": (2e-3, 0.66, 0.996, 0.01, 2_254, 0, 0),
  "3072": (1.5e-3, 0.83, 0.925, 0.0, 1_271, 100, -25),
  "3072_v2.1": (2.0992e-3, 0.60466, 0.85437, 0.1, 1_059, 0, 0),
  "4096": (2.55e-3, 0.71, 0.88, 0.0, 820, 256, -76),
  "6912": (2.9293e-3, 0.7206, 0.78921, 0.001, 700, 0, 0),
  "14336": (3.4065e-3, 0.80690, 0.87310, 0.021345, 454, 314, -112),
  "16384": (3.3e-3, 0.75, 0.9, 0.0, 470, 290, -100),
}


def evaluation_samples(batch_size: int) -> int:
  """Training sequences between two evaluations, by MLPerf's rule."""
  samples = 0.05 * (230.23 * batch_size + 3_000_000)
  return int(samples // 25_000) * 25_000


def get_config(variant: str = "large") -> ml_collections.ConfigDict:
  c = new_config()
  c.seed = 0
  c.dtype = "bfloat16"
  kind, _, which = variant.partition("_")
  build = {"batch": _batch, "mlperf": _mlperf}.get(kind) if which else None
  if build is None:
    lookup(SIZES, variant, "configs/lamb.py")
  c.model = dict(name="bert", size="large" if build else variant)
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
    batch_size=65_536,
    instances=dict(name="nsp"),
    masking=dict(rate=0.15, max_masked=20),
  )
  c.microbatches = 16
  c.optim = dict(
    name="lamb",
    learning_rate=6e-3,
    weight_decay=0.01,
    pre_norm="clip",
    skip_undecayed=True,
    schedule=dict(name="polynomial_reference", warmup=0.2843, power=0.5),
  )
  c.stop = dict(steps=7_038)
  c.evals = dict(heldout=dict(name="objective", num_batches=1, every=200))
  c.every = dict(log=10, checkpoint=200)
  if build:
    return build(c, which)
  c.stages = dict(
    phase1=dict(),
    phase2=dict(
      stop=dict(steps=1_563),
      data=dict(seq_len=512, batch_size=32_768, masking=dict(max_masked=80)),
      optim=dict(learning_rate=4e-3, schedule=dict(warmup=0.128)),
      init_from=dict(carry="optimizer", reset_schedule=True),
    ),
  )
  return _tiny(c) if variant == "tiny" else c


def _batch(c, batch: str):
  batch_size = lookup(
    {str(size): size for size in BATCHES}, batch, "configs/lamb.py:batch_"
  )
  steps = _SEQUENCES // batch_size
  first = round(0.9 * steps)
  rate, warmup = square_root_scaling(batch_size)
  c.data.batch_size = batch_size
  c.microbatches = max(1, batch_size // 4_096)
  c.optim = dict(
    name="lamb",
    learning_rate=rate,
    weight_decay=0.01,
    schedule=dict(name="polynomial_reference", warmup=warmup),
  )
  c.stop = dict(steps=first)
  c.stages = dict(
    phase1=dict(),
    phase2=dict(
      stop=dict(steps=steps - first),
      data=dict(seq_len=512, masking=dict(max_masked=80)),
      init_from=dict(carry="optimizer", reset_schedule=True),
    ),
  )
  return c


def _mlperf(c, batch: str):
  rate, b1, b2, decay, steps, warmup, start = lookup(
    MLPERF, batch, "configs/lamb.py:mlperf_"
  )
  batch_size = int(batch.partition("_")[0])
  c.init_from = dict(path="phase1")
  c.data.update(seq_len=512, batch_size=batch_size, masking=dict(max_masked=76))
  c.microbatches = 1
  c.optim = dict(
    name="lamb",
    learning_rate=rate,
    b1=b1,
    b2=b2,
    weight_decay=decay,
    schedule=dict(
      name="polynomial_reference", warmup=warmup, warmup_start=start
    ),
  )
  every = -(-evaluation_samples(batch_size) // batch_size)
  c.evals.heldout = dict(
    name="objective", num_batches=-(-10_000 // batch_size), every=every
  )
  c.stop = dict(
    steps=steps, target=dict(metric="heldout/mlm_accuracy", value=0.720)
  )
  return c


def _tiny(c):
  c.dtype = "float32"
  c.microbatches = 2
  c.data.source = dict(name="python_docs")
  c.data.tokenizer = dict(name="train", kind="wordpiece", vocab_size=2048)
  c.data.update(seq_len=64, batch_size=16)
  c.stop.steps = 4
  c.evals.heldout.every = 2
  c.every = dict(log=1, checkpoint=2)
  phase2 = c.stages.phase2
  phase2.stop.steps = 3
  phase2.data.update(seq_len=128, batch_size=8, masking=dict(max_masked=20))
  return c
