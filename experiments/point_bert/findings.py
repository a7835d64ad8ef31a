"""What Point-BERT's runs say about its claims."""

from collections.abc import Sequence
from typing import NamedTuple

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
_STAGES = (TOKENIZER, PRETRAINING, FEW_SHOT, CLASSES, PARTS)
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


class Task(NamedTuple):
  """What pre-training is followed by.

  Attributes:
    stage: of the runs.
    clouds: of the runs.
    metric: that is compared.
    what: in words.
    published: the paper's figures.
  """

  stage: str
  clouds: str
  metric: str
  what: str
  published: str


TASKS = (
  Task(
    FEW_SHOT, SHAPES, _ACCURACY,
    "5-way 10-shot classes of shapes",
    "ModelNet40 94.6 against 87.8",
  ),
  Task(
    FEW_SHOT, FURNITURE, _ACCURACY,
    "5-way 10-shot categories of furniture",
    "(the same)",
  ),
  Task(
    CLASSES, SHAPES, _ACCURACY,
    "classes of shapes, a twentieth of the labels",
    "ModelNet40 93.2 against 91.4, all labels",
  ),
  Task(
    CLASSES, FURNITURE, _ACCURACY,
    "categories of furniture",
    "ScanObjectNN OBJ-BG 87.4 against 79.9",
  ),
  Task(
    PARTS, SHAPES, _INSTANCES,
    "instance mIoU of the parts of shapes, a twentieth of the labels",
    "ShapeNetPart 85.6 against 85.1, all labels",
  ),
)  # fmt: skip


def outcome(runs: Sequence[arms.Run], clouds: int) -> Outcome:
  """Claims, tables and figure of finished runs.

  Args:
    runs: of all stages.
    clouds: how many are drawn with what they decode to.
  """
  runs = sorted(runs, key=lambda run: _STAGES.index(run.factors["stage"]))
  return Outcome(
    paper=PAPER,
    counts={"runs": len(runs)},
    claims=_claims(runs),
    rows=[
      run.row(m for m in _TITLES.values() if m in run.metrics) for run in runs
    ],
    summary=arms.summary(_over_folds(runs), _TITLES),
    figure=_figure(runs, clouds),
  )


def _claims(runs: Sequence[arms.Run]) -> list[Claim]:
  """Those whose runs there are."""
  known = {run.factors["arm"] for run in arms.select(runs, stage=TOKENIZER)}
  claims = [_decodes(runs)]
  claims += [_codes_tell(runs)] if FEW_CODES in known else []
  claims += [_codes_spread(runs)] if NO_KL in known else []
  claims += [_guesses(runs)]
  if arms.select(runs, stage=PRETRAINING, arm=SCRATCH):
    claims.append(_probed(runs))
  for task in TASKS:
    if arms.select(runs, stage=task.stage, clouds=task.clouds):
      claims.append(helps(runs, task))
  return claims


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


def helps(runs: Sequence[arms.Run], task: Task) -> Claim:
  """Every seed must gain, on the average over its folds."""
  chosen = arms.select(runs, stage=task.stage, clouds=task.clouds)
  seeds = dict.fromkeys(run.seed for run in chosen)
  gains = [
    arms.gains(
      arms.select(chosen, seed=seed), task.metric, "arm", PRETRAINED, SCRATCH
    ).mean
    for seed in seeds
  ]
  ours, scratch = (
    arms.stat(chosen, task.metric, arm=arm) for arm in (PRETRAINED, SCRATCH)
  )
  shown = ", ".join(f"{gain:+.3f}" for gain in gains)
  return Claim(
    f"Pre-training beats as many steps from scratch: {task.what}",
    task.published,
    f"{ours} against {scratch}; by seed {shown}",
    [gain > 0 for gain in gains],
  )


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
      if chosen := arms.select(runs, stage=TOKENIZER, arm=arm):
        plots.curve(panel, chosen, metric, arm)
    panel.set_title(_title(metric))
    panel.legend(fontsize=7)
  _draw_guesses(curves[3], runs)
  pictures.draw_clouds(
    middle, arms.select(runs, stage=TOKENIZER, arm=BASE)[0], clouds
  )
  panels = below.subplots(1, 5)
  _draw_levels(panels[0], runs)
  for i, (arm, title) in enumerate(
    ((PRETRAINED, "pre-trained"), (SCRATCH, "initial values"))
  ):
    chosen = arms.select(runs, stage=PRETRAINING, arm=arm, clouds=SHAPES)
    for run in chosen[:1]:
      pictures.draw_features(panels[1 + i], panels[3 + i], run, title)
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


def _draw_levels(panel: Axes, runs: Sequence[arms.Run]) -> None:
  """Levels of both arms, task by task."""
  known = [
    task
    for task in TASKS
    if arms.select(runs, stage=task.stage, clouds=task.clouds)
  ]
  for side, arm in ((-1, PRETRAINED), (1, SCRATCH)):
    stats = [
      arms.stat(
        runs, task.metric, stage=task.stage, clouds=task.clouds, arm=arm
      )
      for task in known
    ]
    panel.bar(
      [number + 0.2 * side for number in range(len(known))],
      [stat.mean for stat in stats],
      width=0.4,
      yerr=[stat.spread if len(stat.values) > 1 else 0.0 for stat in stats],
      label=arm,
    )
  names = [f"{task.stage}\n{task.clouds}" for task in known]
  panel.set_xticks(range(len(known)), names, fontsize=6)
  panel.set_title("accuracy, mIoU of parts")
  panel.legend(fontsize=7, loc="lower left")
