"""What Point-BERT's runs say about its claims."""

from collections.abc import Sequence

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bertjax.config import settings
from bertjax.experiment import build_data
from bertjax.loading import load_model
from bertjax.predict import PointTokens, tokenize_points
from experiments import arms, plots
from experiments.outcome import Claim, Outcome

PAPER = "Point-BERT (Yu et al. 2022, arXiv:2111.14819)"

TOKENIZER = "tokenizer"  # the stage
BASE, FEW_CODES, NO_KL = "dVAE", "4 codes", "no KL term"

_L2, _FINE, _USAGE, _PERPLEXITY, _F_SCORE = (
  f"heldout/{name}"
  for name in (
    "cd_l2", "fine_l1", "code_usage", "code_perplexity", "f_score",
  )
)  # fmt: skip
_COLUMNS = (_L2, _FINE, _F_SCORE, _USAGE, _PERPLEXITY)
_BROAD = 0.5  # share of the codes


def outcome(runs: Sequence[arms.Run], clouds: int) -> Outcome:
  """Claims, tables and figure of finished runs.

  Args:
    runs: of all stages.
    clouds: how many are drawn with what they decode to.
  """
  return Outcome(
    paper=PAPER,
    claims=[_decodes(runs), _codes_tell(runs), _codes_spread(runs)],
    counts={"runs": len(runs)},
    rows=[run.row(_COLUMNS) for run in runs],
    summary=arms.summary(
      runs,
      {
        "CD-L2 x1000": _L2,
        "CD-L1 of patches": _FINE,
        "F-score at 0.01": _F_SCORE,
        "share of codes in use": _USAGE,
        "perplexity of codes": _PERPLEXITY,
      },
    ),
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


def _figure(runs: Sequence[arms.Run], clouds: int) -> Figure:
  figure = Figure(figsize=(12, 6.4), layout="constrained")
  FigureCanvasAgg(figure)
  above, below = figure.subfigures(2, 1)
  panels = above.subplots(1, 3)
  metrics = {
    _L2: "CD-L2 x1000, held out",
    _FINE: "CD-L1 of patches, held out",
    _PERPLEXITY: "perplexity of codes",
  }
  for panel, (metric, title) in zip(panels, metrics.items(), strict=True):
    for arm in (BASE, FEW_CODES, NO_KL):
      chosen = arms.select(runs, stage=TOKENIZER, arm=arm)
      plots.curve(panel, chosen, metric, arm)
    panel.set_title(title)
    panel.legend(fontsize=7)
  _draw_clouds(below, arms.select(runs, stage=TOKENIZER, arm=BASE)[0], clouds)
  return figure


def decoded(
  run: arms.Run, count: int
) -> list[tuple[str, np.ndarray, PointTokens]]:
  """Class, points and codes of the last clouds of the test split."""
  model = load_model(run.workdir)
  stage = settings(model.config)
  data = build_data(stage.data, seed=0, cache_dir=stage.cache_path)
  found = data.clouds("test")
  chosen = [found[len(found) - 1 - i] for i in range(count)]
  clouds = [cloud.points[: data.reading.num_points] for cloud in chosen]
  tokens = tokenize_points(model, clouds)
  names = [found.classes[cloud.label] for cloud in chosen]
  return list(zip(names, clouds, tokens, strict=True))


def _draw_clouds(figure: Figure, run: arms.Run, count: int) -> None:
  """Clouds beside what they decode to, coloured by the codes."""
  rows = decoded(run, count)
  axes = figure.subplots(1, 2 * count, subplot_kw={"projection": "3d"})
  for number, (name, cloud, tokens) in enumerate(rows):
    gap = ((cloud[:, None] - tokens.centres) ** 2).sum(-1)
    size = len(tokens.points) // len(tokens.codes)
    codes = tokens.codes[gap.argmin(1)], np.repeat(tokens.codes, size)
    pairs = zip((cloud, tokens.points), codes, (name, "decoded"), strict=True)
    for panel, (points, colours, title) in zip(axes[2 * number :], pairs):
      panel.scatter(*points.T, c=colours % 20, cmap="tab20", s=2)
      panel.set_title(title, fontsize=8)
      panel.set_box_aspect(np.ptp(cloud, axis=0) + 0.1, zoom=1.5)
      panel.set_axis_off()
