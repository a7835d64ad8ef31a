r"""Point-BERT: a tokenizer of point clouds (Yu et al. 2022, arXiv:2111.14819).

Run:   python -m bertjax.train --config=configs/point_bert.py:dvae \
           --config.data.source.path=ShapeNet55 --workdir=runs/dvae
       dvae   the paper's tokenizer: 64 patches of 32 points, 8192 codes
       small  a narrow one on generated shapes: minutes on two cores
Tiny:  --config=configs/point_bert.py:tiny   (seconds, no network)
Then:  python -m bertjax.predict tokenize_points --model=runs/dvae \
           --input=chair.obj
       python -m bertjax.evaluate --model=runs/dvae --split=test \
           --evaluators=reconstruction
Needs: ShapeNet55 as the authors publish it (dvae); nothing (small, tiny).
Seen:  small, in experiments/point_bert; nobody here has ShapeNet.
"""

import ml_collections

from bertjax.config import new_config

_CLOUDS = 41_952  # of ShapeNet55's train.txt


def get_config(variant: str = "dvae") -> ml_collections.ConfigDict:
  makers = {"dvae": _dvae, "small": _small, "tiny": _tiny}
  if variant not in makers:
    raise ValueError(
      f"configs/point_bert.py:{variant} is unknown; choose from"
      f" {', '.join(makers)}."
    )
  return makers[variant]()


def _dvae() -> ml_collections.ConfigDict:
  """The released configuration: 300 epochs of 64 clouds."""
  c = new_config()
  c.seed = 0
  c.model = dict(
    name="point_tokenizer", patches=64, patch_size=32, vocab_size=8192
  )
  c.objective = dict(
    name="point_reconstruction",
    temperature_steps=100_000,
    kl_delay=10_000,
    kl_steps=100_000,
  )
  c.data = dict(
    name="points",
    source=dict(name="shapenet55", path="ShapeNet55"),
    num_points=1024,
    draw="subset",
    batch_size=64,
  )
  epoch = -(-_CLOUDS // 64)
  c.optim = dict(
    name="adamw",
    learning_rate=5e-4,
    weight_decay=5e-4,
    # From 1e-6 over ten epochs, then half a cosine down to 1e-6.
    schedule=dict(name="cosine", warmup=10 * epoch, end_factor=2e-3),
  )
  c.stop = dict(steps=300 * epoch)
  c.evals = dict(
    heldout=dict(name="reconstruction", split="test", every=10 * epoch)
  )
  c.every = dict(log=100, checkpoint=epoch)
  return c


def _small() -> ml_collections.ConfigDict:
  """Generated shapes, 16 patches of 32 points, 64 codes."""
  c = _dvae()
  c.model = dict(
    name="point_tokenizer",
    patches=16,
    patch_size=32,
    vocab_size=64,
    features=64,
    shrink=8,
  )
  c.data.source = dict(name="procedural", points=1024, jitter=0.02, stretch=1.6)
  c.data.num_points = 512
  # Even samples: what differs between patches is more surface, less chance.
  c.data.stored_points, c.data.farthest = 640, True
  c.data.batch_size = 16
  # At 1, the paper's, the largest noise drowns what the codes say from the
  # start, and nearly all of them fall out of use.
  c.objective.temperature = 4.0
  c.objective.temperature_steps = 700
  # The paper's 0.1 would keep codes of 16 patches from ever being decided.
  c.objective.kl_weight = 0.005
  c.objective.kl_delay, c.objective.kl_steps = 0, 1
  c.optim.learning_rate = 5e-3
  c.optim.schedule = dict(name="cosine", warmup=0.05, end_factor=2e-3)
  c.stop.steps = 900
  c.evals.heldout = dict(name="reconstruction", split="test", every=150)
  c.every = dict(log=25, checkpoint=450)
  return c


def _tiny() -> ml_collections.ConfigDict:
  """The same, so little that it only shows that everything runs."""
  c = _small()
  c.model.patches, c.model.patch_size = 6, 8
  c.model.features, c.model.vocab_size = 16, 16
  c.model.shrink = 32
  c.data.source.sizes = dict(train=48, validation=12, test=12)
  c.data.source.points = 128
  c.data.stored_points = 80
  c.data.num_points, c.data.batch_size = 64, 8
  c.stop.steps = 8
  c.evals.heldout.every = 4
  c.every = dict(log=2, checkpoint=4)
  return c
