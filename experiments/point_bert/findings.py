"""What Point-BERT's runs say about its claims."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from experiments import arms, plots
from experiments.outcome import Claim, Outcome
from experiments.point_bert import pictures

PAPER = "Point-BERT (Yu et al. 2022, arXiv:2111.14819)"

# Stages.
TOKENIZER, PRETRAINING = "tokenizer", "pre-training"
FEW_SHOT, CLASSES, PARTS = "few-shot", "classes", "parts"
# Arms.
BASE, FEW_CODES, NO_KL = "dVAE", "4 codes", "no KL term"
PRETRAINED, SCRATCH = "pre-trained", "from scratch"
# Clouds.
SHAPES, FURNITURE = "shapes", "furniture"

_L2, _FINE, _USAGE, _PERPLEXITY, _F_SCORE = (
  f"heldout/{name}"
  for name in (
    "cd_l2", "fine_l1", "code_usage", "code_perplexity", "f_score",
  )
)  # fmt: skip
_TOKENS, _MIXED, _FREQUENT, _PROBE = (
  "heldout/tokens_accuracy",
  "heldout/mixed_tokens_accuracy",
  "heldout/frequent_code_share",
  "probe/accuracy",
)
_ACCURACY, _INSTANCES, _CATEGORIES = (
  "heldout/accuracy",
  "heldout/instance_miou",
  "heldout/class_miou",
)
_TITLES = {
  "CD-L2 x1000": _L2,
  "CD-L1 of patches": _FINE,
  "F-score at 0.01": _F_SCORE,
  "share of codes in use": _USAGE,
  "perplexity of codes": _PERPLEXITY,
  "accuracy on hidden codes": _TOKENS,
  "most frequent code": _FREQUENT,
  "linear probe": _PROBE,
  "accuracy": _ACCURACY,
  "instance mIoU": _INSTANCES,
  "class mIoU": _CATEGORIES,
}
_BROAD = 0.5  # share of the codes


def outcome(runs: Sequence[arms.Run], clouds: int) -> Outcome:
  """Claims, tables and figure of finished runs.

  Args:
    runs: of all stages.
    clouds: how many are drawn with what they decode to.
  """
  return Outcome(
    paper=PAPER,
    claims=[
      _decodes(runs),
      _codes_tell(runs),
      _codes_spread(runs),
      _guesses(runs),
      _probed(runs),
      *(_few_shots(runs, clouds) for clouds in (SHAPES, FURNITURE)),
      *(_fine_tuned(runs, clouds) for clouds in (SHAPES, FURNITURE)),
      _segmented(runs),
    ],
    counts={"runs": len(runs)},
    rows=[
      run.row(c for c in _TITLES.values() if c in run.metrics) for run in runs
    ],
    summary=arms.summary(_over_folds(runs), _TITLES),
    figure=_figure(runs, clouds),
  )


def _decodes(runs: Sequence[arms.Run]) -> Claim:
  chosen = arms.select(runs, stage=TOKENIZER, arm=BASE)
  curves = [run.curve(_L2)[1] for run in chosen]
  usage, perplexity = (arms.stat(chosen, m) for m in (_USAGE, _PERPLEXITY))
  ends = ", ".join(f"{c[0]:.1f} to {c[-1]:.1f}" for c in curves)
  return Claim(
    "The tokenizer learns to decode while its vocabulary stays in use: CD-L2"
    " falls, more than half of the codes are some patch's likeliest",
    "curves not reported",
    f"CD-L2 x1000 from {ends} between the first and the last evaluation;"
    f" {usage} of the codes in use, perplexity {perplexity:.1f}",
    [
      *(c[-1] < c[0] for c in curves),
      min(usage.values) > _BROAD,
    ],
  )


def _codes_tell(runs: Sequence[arms.Run]) -> Claim:
  gain = arms.gains(runs, _FINE, "arm", BASE, FEW_CODES, stage=TOKENIZER)
  few = arms.stat(runs, _FINE, arm=FEW_CODES)
  return Claim(
    "Codes tell patches apart: with more of them patches are decoded better",
    "not reported",
    f"CD-L1 of held-out patches {gain:+.4f} against {few:.4f} of 4 codes",
    [max(gain.values) < 0],
  )


def _codes_spread(runs: Sequence[arms.Run]) -> Claim:
  gain = arms.gains(runs, _PERPLEXITY, "arm", BASE, NO_KL, stage=TOKENIZER)
  without = arms.stat(runs, _PERPLEXITY, arm=NO_KL)
  return Claim(
    "The KL term spreads the codes",
    "not reported",
    f"perplexity {gain:+.1f} against {without:.1f} without it",
    [min(gain.values) > 0],
  )


def _guesses(runs: Sequence[arms.Run]) -> Claim:
  chosen = arms.select(runs, stage=PRETRAINING, arm=PRETRAINED, clouds=SHAPES)
  found, mixed, frequent = (
    arms.stat(chosen, metric) for metric in (_TOKENS, _MIXED, _FREQUENT)
  )
  return Claim(
    "The Transformer learns to guess codes of hidden patches: more often right"
    " than the most frequent code of each batch",
    "curves not reported",
    f"{found} of the codes of unseen shapes, {mixed} in mixtures; the most"
    f" frequent code {frequent.mean:.3f}",
    [a > b for a, b in zip(found.values, frequent.values, strict=True)],
  )


def _probed(runs: Sequence[arms.Run]) -> Claim:
  found = arms.stat(
    runs, _PROBE, stage=PRETRAINING, arm=PRETRAINED, clouds=SHAPES
  )
  without = arms.stat(runs, _PROBE, stage=PRETRAINING, arm=SCRATCH)
  return Claim(
    "Pre-training separates classes without labels: a linear SVM on [CLS] is"
    " more accurate than on that of initial values",
    "t-SNE (figure 5)",
    f"{found} against {without}",
    [value > without.mean for value in found.values],
  )


def by_seed(
  runs: Sequence[arms.Run], metric: str, stage: str, clouds: str
) -> tuple[dict[int, float], arms.Stat, arms.Stat]:
  """Gain of pre-training by seed, over its folds; the level of either arm."""
  chosen = arms.select(runs, stage=stage, clouds=clouds)
  gains = {
    seed: arms.gains(
      arms.select(chosen, seed=seed), metric, "arm", PRETRAINED, SCRATCH
    ).mean
    for seed in dict.fromkeys(run.seed for run in chosen)
  }
  return gains, *(
    arms.stat(chosen, metric, arm=arm) for arm in (PRETRAINED, SCRATCH)
  )


def _gain(
  runs: Sequence[arms.Run],
  metric: str,
  stage: str,
  clouds: str,
  claim: str,
  published: str,
) -> Claim:
  gains, ours, scratch = by_seed(runs, metric, stage, clouds)
  shown = ", ".join(f"{gain:+.3f}" for gain in gains.values())
  return Claim(
    claim,
    published,
    f"{ours} against {scratch}; by seed {shown}",
    [gain > 0 for gain in gains.values()],
  )


def _few_shots(runs: Sequence[arms.Run], clouds: str) -> Claim:
  folds = {
    run.factors["fold"]
    for run in arms.select(runs, stage=FEW_SHOT, clouds=clouds)
  }
  return _gain(
    runs, _ACCURACY, FEW_SHOT, clouds,
    f"Pre-training helps where there are few labels: 5-way 10-shot, {clouds},"
    f" mean over {len(folds)} folds",
    "ModelNet40 94.6 against 87.8",
  )  # fmt: skip


def _fine_tuned(runs: Sequence[arms.Run], clouds: str) -> Claim:
  return _gain(
    runs, _ACCURACY, CLASSES, clouds,
    f"Pre-training helps to tell all classes of {clouds} apart",
    {
      SHAPES: "ModelNet40 93.2 against 91.4",
      FURNITURE: "ScanObjectNN OBJ-BG 87.4 against 79.9",
    }[clouds],
  )  # fmt: skip


def _segmented(runs: Sequence[arms.Run]) -> Claim:
  return _gain(
    runs, _INSTANCES, PARTS, SHAPES,
    "Pre-training helps to find the parts of shapes: instance mIoU",
    "ShapeNetPart 85.6 against 85.1",
  )  # fmt: skip


def _over_folds(runs: Sequence[arms.Run]) -> list[arms.Run]:
  """The same without the number of the fold, over which tables average."""
  return [
    arms.Run(
      {k: v for k, v in run.factors.items() if k != "fold"},
      run.seed, run.metrics, run.seconds, run.workdir,
    )
    for run in runs
  ]  # fmt: skip


def _figure(runs: Sequence[arms.Run], clouds: int) -> Figure:
  figure = Figure(figsize=(15, 10.5), layout="constrained")
  FigureCanvasAgg(figure)
  above, middle, below = figure.subfigures(3, 1)
  curves = above.subplots(1, 4)
  for panel, metric in zip(curves, (_L2, _FINE, _PERPLEXITY)):
    for arm in (BASE, FEW_CODES, NO_KL):
      chosen = arms.select(runs, stage=TOKENIZER, arm=arm)
      plots.curve(panel, chosen, metric, arm)
    panel.set_title(_title(metric))
    panel.legend(fontsize=7)
  _draw_guesses(curves[3], runs)
  pictures.draw_clouds(
    middle, arms.select(runs, stage=TOKENIZER, arm=BASE)[0], clouds
  )
  panels = below.subplots(1, 5)
  _draw_gains(panels[0], runs)
  for i, arm in enumerate((PRETRAINED, SCRATCH)):
    run, *_ = arms.select(runs, stage=PRETRAINING, arm=arm, clouds=SHAPES)
    title = {PRETRAINED: arm, SCRATCH: "initial values"}[arm]
    pictures.draw_features(panels[1 + i], panels[3 + i], run, title, i == 1)
  return figure


def _title(metric: str) -> str:
  (title,) = (t for t, m in _TITLES.items() if m == metric)
  return title


def _draw_guesses(panel: Axes, runs: Sequence[arms.Run]) -> None:
  chosen = arms.select(runs, stage=PRETRAINING, arm=PRETRAINED, clouds=SHAPES)
  for metric in (_TOKENS, _FREQUENT, _PROBE):
    plots.curve(panel, chosen, metric, _title(metric))
  panel.set_title("pre-training, unseen shapes")
  panel.legend(fontsize=7)


def _draw_gains(panel: Axes, runs: Sequence[arms.Run]) -> None:
  """Levels of both arms, task by task."""
  tasks = {
    f"{stage}\n{clouds}": (metric, stage, clouds)
    for metric, stage, clouds in (
      (_ACCURACY, FEW_SHOT, SHAPES),
      (_ACCURACY, FEW_SHOT, FURNITURE),
      (_ACCURACY, CLASSES, SHAPES),
      (_ACCURACY, CLASSES, FURNITURE),
      (_INSTANCES, PARTS, SHAPES),
    )
  }
  for arm in (PRETRAINED, SCRATCH):
    stats = [
      arms.stat(runs, metric, stage=stage, clouds=clouds, arm=arm)
      for metric, stage, clouds in tasks.values()
    ]
    plots.levels(panel, range(len(tasks)), stats, arm)
  panel.set_xticks(range(len(tasks)), tasks, fontsize=6)
  panel.set_title("accuracy, mIoU of parts")
  panel.legend(fontsize=7)
