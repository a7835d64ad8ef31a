"""What BERT's runs say about its claims."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure

from experiments import arms, plots
from experiments.outcome import Claim, Outcome

PAPER = "BERT (Devlin et al. 2018, arXiv:1810.04805)"

MLM_NSP, MLM = "MLM + NSP", "MLM"
MLM_CAUSAL, LTR = "MLM, causal attention", "left-to-right LM"
PRE_TRAINED, RANDOM = "pre-trained", "random"

_MLM_ACCURACY, _NSP_ACCURACY, _UNIGRAM, _TEST = (
  "heldout/mlm_accuracy",
  "heldout/nsp_accuracy",
  "heldout/unigram_accuracy",
  "test/accuracy",
)
_COLUMNS = (_MLM_ACCURACY, _UNIGRAM, _NSP_ACCURACY, _TEST)
_BLOCKS = 10  # parts of the loss curve that are compared
_WARMUP = 0.1  # share of the steps, as in configs/grammar.py


def outcome(runs: Sequence[arms.Run]) -> Outcome:
  """Claims, tables and figure of finished runs."""
  return Outcome(
    paper=PAPER,
    claims=[
      _both_tasks(runs),
      _falling_loss(runs),
      _bidirectional(runs),
      *(_pre_trained(runs, task) for task in ("topics", "docstrings")),
    ],
    counts={"runs": len(runs)},
    rows=[run.row([c for c in _COLUMNS if c in run.metrics]) for run in runs],
    summary=arms.summary(
      runs,
      {
        "MLM accuracy": _MLM_ACCURACY,
        "NSP accuracy": _NSP_ACCURACY,
        "test accuracy": _TEST,
      },
    ),
    figure=_figure(runs),
  )


def _both_tasks(runs: Sequence[arms.Run]) -> Claim:
  chosen = arms.select(runs, task="grammar", arm=MLM_NSP)
  mlm, nsp, unigram = (
    arms.stat(chosen, m) for m in (_MLM_ACCURACY, _NSP_ACCURACY, _UNIGRAM)
  )
  return Claim(
    "BERT-tiny learns both tasks: MLM above twice the accuracy of guessing by"
    " frequency, NSP above 0.8",
    "not reported",
    f"MLM {mlm} (frequency {unigram.mean:.3f}), NSP {nsp}",
    [min(mlm.values) > 2 * max(unigram.values), min(nsp.values) > 0.8],
  )


def block_means(run: arms.Run) -> np.ndarray:
  """Means of the training loss over equal parts of the steps after warm-up."""
  steps, losses = (np.array(x) for x in run.curve("loss"))
  after = losses[steps > _WARMUP * steps[-1]]
  parts = np.array_split(after, min(_BLOCKS, len(after)))
  return np.array([part.mean() for part in parts])


def _falling_loss(runs: Sequence[arms.Run]) -> Claim:
  falls = [
    np.diff(block_means(run)) < 0
    for run in arms.select(runs, task="grammar", arm=MLM_NSP)
  ]
  return Claim(
    "The loss falls monotonically after warm-up",
    "not reported",
    f"of {len(falls[0])} differences between means over equal parts of the"
    f" steps, {', '.join(str(int(f.sum())) for f in falls)} fall (by seed)",
    [bool(f.all()) for f in falls],
  )


def _bidirectional(runs: Sequence[arms.Run]) -> Claim:
  chosen = arms.select(runs, task="grammar")
  over_lm, over_causal = (
    arms.gains(chosen, _MLM_ACCURACY, "arm", MLM, arm)
    for arm in (LTR, MLM_CAUSAL)
  )
  return Claim(
    "A bidirectional masked LM beats left-to-right at equal size",
    "worse left to right on every task (section 5.1)",
    f"accuracy on the same words: {over_lm:+.3f} over the left-to-right LM,"
    f" {over_causal:+.3f} over MLM with causal attention",
    [min(over_lm.values) > 0, min(over_causal.values) > 0],
  )


def _labels(runs: Sequence[arms.Run], task: str) -> list[int]:
  found = {
    r.factors["labels"] for r in arms.select(runs, task=task, arm=RANDOM)
  }
  return sorted(found)


def _pre_trained(runs: Sequence[arms.Run], task: str) -> Claim:
  gains = {
    labels: arms.gains(
      runs, _TEST, "arm", PRE_TRAINED, RANDOM, task=task, labels=labels
    )
    for labels in _labels(runs, task)
  }
  shown = "; ".join(f"{n} labels {gain:+.3f}" for n, gain in gains.items())
  return Claim(
    f"Pre-training beats random initialisation downstream: {task}",
    "GLUE 79.6 (base); no random start reported",
    f"test accuracy: {shown}",
    [min(gain.values) > 0 for gain in gains.values()],
  )


def _figure(runs: Sequence[arms.Run]) -> Figure:
  figure, axes = plots.panels(4)
  chosen = arms.select(runs, task="grammar", arm=MLM_NSP)
  plots.curve(axes[0], chosen, "loss", MLM_NSP)
  axes[0].set_title("training loss")
  for arm in (MLM_NSP, MLM, MLM_CAUSAL, LTR):
    chosen = arms.select(runs, task="grammar", arm=arm)
    plots.curve(axes[1], chosen, _MLM_ACCURACY, arm)
  axes[1].axhline(
    arms.stat(chosen, _UNIGRAM).mean, color="gray", ls="--", label="frequency"
  )
  axes[1].set_title("accuracy on masked words")
  for panel, task in zip(axes[2:], ("topics", "docstrings"), strict=True):
    labels = _labels(runs, task)
    for arm in (PRE_TRAINED, RANDOM):
      stats = [
        arms.stat(runs, _TEST, task=task, arm=arm, labels=n) for n in labels
      ]
      plots.levels(panel, labels, stats, arm)
    panel.set_xscale("log", base=2)
    panel.set_xticks(labels, [str(n) for n in labels])
    panel.set_xlabel("labelled examples")
    panel.set_title(f"{task}: test accuracy")
  for panel in axes:
    panel.legend(fontsize=7)
  return figure
