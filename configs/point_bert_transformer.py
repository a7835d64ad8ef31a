r"""Point-BERT: its Transformer (Yu et al. 2022, arXiv:2111.14819).

Run:   python -m bertjax.train --workdir=runs/points \
           --config=configs/point_bert_transformer.py:pretrain \
           --config.init_from.path=runs/dvae
       python -m bertjax.train --workdir=runs/modelnet40 \
           --config=configs/point_bert_transformer.py:classify \
           --config.init_from.path=runs/points
       pretrain   masked point modelling; runs/dvae is of configs/point_bert.py,
                  or the authors' dVAE.pth
       classify   ModelNet40 from 1024 points (classify_4k: 4096, classify_8k:
                  8192); from runs/points, or the authors' Point-BERT.pth
       scratch    classify without pre-training, from other initial values
       scans      ScanObjectNN; data.source.variant is one of its three
       few_shot   5 classes of ModelNet40, 10 clouds of each; one fold of ten
       segment    parts of ShapeNetPart's 16 categories
Then:  python -m bertjax.predict classify_points --model=runs/modelnet40 \
           --input=chair.obj --votes=10
       python -m bertjax.predict segment_points --model=runs/parts \
           --input=chair.obj --category=Chair --output=parts.ply
Small: --config=configs/point_bert_transformer.py:small   all three stages on
       generated shapes, no network
Tiny:  --config=configs/point_bert_transformer.py:tiny   (they just run)
Needs: ShapeNet55, ModelNet40, ScanObjectNN or ShapeNetPart as the authors
       publish them. A linear probe of ModelNet40 chooses among checkpoints of
       pre-training; evals.probe.data.source names another source.
Seen:  small, in experiments/point_bert; nobody here has their collections.

The rate changes with every step here, with every epoch there.
"""

import ml_collections

from bertjax.config import new_config

_PRETRAINING, _MODELNET, _PARTS = 41_952 + 10_518, 9_843, 14_007  # clouds
# Theirs: what has one axis, biases, and names with "token".
_NO_DECAY = (r"/(bias|scale)$", r"embeddings/(cls|mask)$")
_AUGMENT = (dict(name="scale_shift"),)
# The tokenizer's `MiniPointNet` begins the encoder's; all else begins afresh.
_FROM_TOKENIZER = dict(
  renames=((r"^encoder/embed/", "encoder/embeddings/patches/"),),
  ignore=(r"^encoder/(to_codes|from_codes|codebook|decode)",),
  allow_missing=(
    r"^encoder/(layers|positions|final_norm)",
    r"^encoder/embeddings/(project|cls|mask)",
    r"^(token_head|contrast_head)/",
  ),
)


def get_config(variant: str = "pretrain") -> ml_collections.ConfigDict:
  makers = {
    "pretrain": _pretrain,
    "classify": _classify,
    "classify_4k": lambda: _classify(4096),
    "classify_8k": lambda: _classify(8192),
    "scratch": _scratch,
    "scans": _scans,
    "few_shot": _few_shot,
    "segment": _segment,
    "small": _small,
    "tiny": _tiny,
  }
  if variant not in makers:
    raise ValueError(
      f"configs/point_bert_transformer.py:{variant} is unknown; choose from"
      f" {', '.join(makers)}."
    )
  return makers[variant]()


def _optim(warmup: int | float) -> dict:
  """AdamW; up from 0 over steps or a share of all, down to 1e-6 after that."""
  return dict(
    name="adamw",
    learning_rate=5e-4,
    weight_decay=0.05,
    no_decay=_NO_DECAY,
    schedule=dict(name="cosine", warmup=warmup, end_factor=2e-3),
  )


def _pretrain() -> ml_collections.ConfigDict:
  """300 epochs of 128 clouds."""
  c = new_config()
  c.seed = 0
  c.init_from = dict(path="runs/dvae", **_FROM_TOKENIZER)
  c.model = dict(name="point_bert", patches=64, patch_size=32)
  # Without path that of init_from; named, so that a plan needs no folder.
  c.objective = dict(
    name="masked_points",
    tokenizer=dict(name="point_tokenizer", vocab_size=8192, path=None),
  )
  c.data = dict(
    name="points",
    source=dict(name="shapenet55", path="ShapeNet55"),
    train_split="all",
    num_points=1024,
    draw="subset",
    augment=_AUGMENT,
    batch_size=128,
  )
  epoch = -(-_PRETRAINING // 128)
  c.optim = _optim(3 * epoch)
  c.stop = dict(steps=300 * epoch)
  # Of what the contrast head says of clouds of their own farthest points.
  modelnet = dict(
    source=dict(name="modelnet40", path="ModelNet40"),
    train_split="train",
    stored_points=1024,
    farthest=True,
    draw_eval="first",
  )
  c.evals.probe = dict(
    name="linear_probe",
    features="contrast",
    split="test",
    data=modelnet,
    every=10 * epoch,
  )
  c.keep = dict(best_metric="probe/accuracy")
  c.every = dict(log=100, checkpoint=epoch)
  return c


# Points of a row: patches, and the farthest points that it is drawn of.
_DENSITIES = {1024: (64, 1200), 4096: (256, 4800), 8192: (512, 8192)}


def _classify(num_points: int = 1024) -> ml_collections.ConfigDict:
  """300 epochs of 32 clouds."""
  patches, stored = _DENSITIES[num_points]
  c = new_config()
  c.seed = 0
  c.init_from = dict(path="runs/points")
  c.model = dict(name="point_bert", patches=patches, patch_size=32)
  c.objective = dict(name="point_classification")
  c.data = dict(
    name="points",
    source=dict(name="modelnet40", path="ModelNet40"),
    num_points=num_points,
    # 1024 of 1200 points that lie far apart; the first of them to evaluate.
    stored_points=stored,
    farthest=True,
    draw="subset",
    draw_eval="first",
    augment=_AUGMENT,
    batch_size=32,
  )
  epoch = -(-_MODELNET // 32)
  c.optim = dict(_optim(10 * epoch), clip_norm=10.0)
  c.stop = dict(steps=300 * epoch)
  c.evals = dict(
    heldout=dict(name="objective", split="test", every=epoch),
    votes=dict(name="voting", split="test", every=10 * epoch),
  )
  c.every = dict(log=100, checkpoint=epoch)
  return c


def _scratch() -> ml_collections.ConfigDict:
  c = _classify()
  c.init_from = None
  c.model.start = "classifier"
  return c


def _scans() -> ml_collections.ConfigDict:
  """300 epochs of 32 scans, which are neither moved nor scaled."""
  c = _classify()
  c.data.source = dict(
    name="scanobjectnn", path="ScanObjectNN", variant="hardest"
  )
  c.data.unit_sphere = False
  c.optim = dict(_optim(10 / 300), clip_norm=10.0)
  c.stop = dict(epochs=300)
  c.evals.heldout = dict(name="objective", split="test", every_epochs=1)
  c.evals.votes = dict(name="voting", split="test", every_epochs=10)
  c.every.checkpoint = 100
  return c


def _few_shot() -> ml_collections.ConfigDict:
  """150 epochs of 50 clouds, of the authors' tasks."""
  c = _classify()
  c.data.source = dict(
    name="modelnet40_few_shot",
    path="ModelNetFewshot",
    ways=5,
    shots=10,
    fold=0,
  )
  c.optim = dict(_optim(10 / 150), clip_norm=10.0)
  c.stop = dict(epochs=150)
  c.evals = dict(heldout=dict(name="objective", split="test"))
  c.every.checkpoint = 100
  return c


def _segment() -> ml_collections.ConfigDict:
  """300 epochs of 16 clouds of 2048 points in 128 patches."""
  c = _classify()
  c.model = dict(name="point_bert", patches=128, patch_size=32)
  c.objective = dict(name="part_segmentation")
  c.data = dict(
    name="points",
    source=dict(name="shapenetpart", path="ShapeNetPart"),
    num_points=2048,
    draw="replacement",
    parts=True,
    augment=_AUGMENT,
    batch_size=16,
  )
  epoch = -(-_PARTS // 16)
  c.objective.batch_norm_momentum = dict(
    start=0.1, factor=0.5, every=20 * epoch, floor=0.01
  )
  c.optim = _optim(10 * epoch)
  c.stop = dict(steps=300 * epoch)
  c.evals = dict(heldout=dict(name="part_iou", split="test", every=epoch))
  c.every = dict(log=100, checkpoint=epoch)
  return c


def _small() -> ml_collections.ConfigDict:
  """Tokenizer, pre-training, classes: on generated shapes, one after another.

  Each stage begins from the one before.
  """
  patches = dict(patches=16, patch_size=32)
  narrow = dict(patch_features=64, shrink=8, num_layers=3, emb_dim=64)
  trunk = dict(name="point_bert", num_heads=4, **patches, **narrow)
  c = new_config()
  c.seed = 0
  c.model, c.objective, c.evals = {}, {}, {}
  c.data = dict(
    name="points",
    source=dict(name="procedural", points=1024, jitter=0.02, stretch=1.6),
    num_points=512,
    stored_points=640,
    farthest=True,
    draw="subset",
    augment=_AUGMENT,
    batch_size=32,
  )
  c.optim = dict(
    name="adamw",
    learning_rate=1e-3,
    weight_decay=0.05,
    schedule=dict(name="cosine", warmup=0.05, end_factor=2e-3),
  )
  c.stop = {}
  c.every = dict(log=25, checkpoint=500)
  held_out = dict(name="objective", split="test", every=125)
  probe = dict(name="linear_probe", split="test", num_batches=15, every=125)
  tokenizer = dict(
    model=dict(
      name="point_tokenizer", vocab_size=64, features=64, shrink=8, **patches
    ),
    # See configs/point_bert.py:small.
    objective=dict(
      name="point_reconstruction",
      temperature=4.0,
      temperature_steps=700,
      kl_weight=0.005,
      kl_delay=0,
      kl_steps=1,
    ),
    data=dict(batch_size=16, augment=()),
    optim=dict(learning_rate=5e-3, weight_decay=5e-4),
    stop=dict(steps=900),
    evals=dict(heldout=dict(name="reconstruction", split="test", every=150)),
  )
  pretrain = dict(
    init_from=_FROM_TOKENIZER,
    model=trunk,
    objective=dict(
      name="masked_points",
      tokenizer={},
      contrast_dim=64,
      queue_size=512,
      momentum=0.99,  # the paper's would hardly have moved
    ),
    optim=dict(no_decay=_NO_DECAY),
    stop=dict(steps=500),
    evals=dict(heldout=held_out, probe=probe),
  )
  classify = dict(
    init_from={},
    model=trunk,
    objective=dict(name="point_classification"),
    optim=dict(no_decay=_NO_DECAY, clip_norm=10.0),
    stop=dict(steps=500),
    evals=dict(heldout=held_out),
  )
  # A ConfigDict sorts its keys.
  c.stages = {
    "1_tokenizer": tokenizer,
    "2_pretrain": pretrain,
    "3_classify": classify,
  }
  return c


def _tiny() -> ml_collections.ConfigDict:
  """The same, so little that it only shows that everything runs."""
  c = _small()
  c.data.source.sizes = dict(train=48, validation=12, test=12)
  c.data.source.points = 128
  c.data.stored_points = 80
  c.data.num_points, c.data.batch_size = 64, 8
  c.every = dict(log=1, checkpoint=2)
  for stage in c.stages.values():
    stage.stop.steps = 2
    stage.model.patches, stage.model.patch_size = 6, 8
    stage.model.shrink = 32
    for evaluation in stage.evals.values():
      evaluation.every = 2
  del c.stages["1_tokenizer"].data.batch_size
  c.stages["1_tokenizer"].model.features = 16
  c.stages["1_tokenizer"].model.vocab_size = 16
  c.stages["2_pretrain"].objective.queue_size = 16
  for stage in (c.stages["2_pretrain"], c.stages["3_classify"]):
    stage.model.update(patch_features=16, num_layers=2, emb_dim=16, num_heads=2)
  return c
