"""What the runs say about LAMB's claim."""

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from experiments import arms, plots
from experiments.outcome import Claim, Outcome

PAPER = "LAMB (You et al. 2020, arXiv:1904.00962)"
LAMB, ADAMW, LARS = "LAMB", "AdamW", "LARS"
NAMES = {LAMB: "lamb", ADAMW: "adamw", LARS: "lars"}
LOSS = "heldout/mlm_loss"
_ACCURACY = "heldout/mlm_accuracy"
_UNIGRAM = "heldout/unigram_loss"
MARGIN = 0.1  # nats
DIVERGED = {LOSS: math.inf, _ACCURACY: 0.0, "loss": math.inf}


def outcome(
  runs: Sequence[arms.Run],
  trials: Sequence[arms.Run],
  calmer: Sequence[arms.Run] = (),
) -> Outcome:
  """Claims, tables and figure.

  Args:
    runs: finished, by factors "optimizer", "batch_size" and "base_rate".
    trials: those that chose the rates.
    calmer: of other rates, to show beside them.
  """
  metrics = {"held-out loss": LOSS, "masked accuracy": _ACCURACY}
  return Outcome(
    paper=PAPER,
    claims=[_ordering(runs), _largest(runs)],
    counts={"runs": len(trials) + len(runs) + len(calmer)},
    rows=[
      run.row([LOSS, _ACCURACY, "loss"]) for run in (*trials, *runs, *calmer)
    ],
    summary=arms.summary((*runs, *calmer), metrics),
    figure=_figure(runs),
  )


def _sizes(runs: Sequence[arms.Run]) -> list[int]:
  return sorted({run.factors["batch_size"] for run in runs})


def _at(runs, optimizer: str, batch_size: int) -> arms.Stat:
  return arms.stat(runs, LOSS, optimizer=optimizer, batch_size=batch_size)


def _ordering(runs: Sequence[arms.Run]) -> Claim:
  shown, holds = [], []
  for size in _sizes(runs)[1:]:
    lamb, adamw, lars = (_at(runs, name, size) for name in NAMES)
    shown.append(f"{size}: LAMB {lamb}, AdamW {adamw}, LARS {lars}")
    worst = not math.isfinite(lars.mean) or adamw.mean < lars.mean
    holds += [lamb.mean < adamw.mean, worst]
  return Claim(
    "At a rate tuned for a small batch and scaled by the square-root rule, LAMB"
    " is the best and LARS the worst at every larger batch",
    "SQuAD F1 at 32k: LAMB 91.5, LARS diverges; AdamW fails beyond 16k",
    f"held-out loss at {'; '.join(shown)}",
    holds,
  )


def _largest(runs: Sequence[arms.Run]) -> Claim:
  largest = {name: _learning_until(runs, name) for name in NAMES}
  shown = ", ".join(f"{name} {size}" for name, size in largest.items())
  return Claim(
    "LAMB goes on learning at larger batches than the others",
    "until 32k and 64k; AdamW fails beyond 16k, LARS diverges at 32k",
    f"largest batch with a held-out loss {MARGIN} below that of word"
    f" frequencies: {shown}",
    [largest[LAMB] > largest[ADAMW], largest[LAMB] > largest[LARS]],
  )


def _learning_until(runs: Sequence[arms.Run], optimizer: str) -> int:
  """The largest batch, without gaps, at which more than frequencies is learnt.

  0 if there is none.
  """
  last = 0
  frequencies = next(
    run.metrics[_UNIGRAM] for run in runs if _UNIGRAM in run.metrics
  )
  for size in _sizes(runs):
    if not _at(runs, optimizer, size).mean < frequencies - MARGIN:
      break
    last = size
  return last


def _figure(runs: Sequence[arms.Run]) -> Figure:
  figure, (by_size, curves) = plots.panels(2)
  sizes = _sizes(runs)
  for name in NAMES:
    stats = [_at(runs, name, size) for size in sizes]
    plots.levels(by_size, sizes, stats, name)
    chosen = arms.select(runs, optimizer=name, batch_size=sizes[-1])
    plots.curve(curves, chosen, "loss", name)
  by_size.set_xscale("log", base=2)
  by_size.set_xlabel("batch")
  by_size.set_title("held-out loss at equal examples")
  curves.set_title(f"training loss, batch {sizes[-1]}")
  for panel in (by_size, curves):
    panel.legend(fontsize=7)
  return figure
