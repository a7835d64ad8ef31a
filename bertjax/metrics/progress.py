"""What a person sees while a run goes on: a bar, or plain lines in a log."""

import io
import sys
from collections.abc import Mapping

import jax

# name in the metrics, label, format
_SHOWN = (
  ("loss", "loss", "{:.4f}"),
  ("mlm_accuracy", "acc", "{:.3f}"),
  ("accuracy", "acc", "{:.3f}"),
  ("learning_rate", "lr", "{:.2e}"),
  ("tokens_per_s", "tok/s", "{:,.0f}"),
  ("mfu", "mfu", "{:.1%}"),
)


def describe(values: Mapping[str, float]) -> dict[str, str]:
  """The metrics worth a glance, as short strings by label."""
  return {
    label: form.format(values[name])
    for name, label, form in _SHOWN
    if name in values
  }


def duration(seconds: float) -> str:
  """`75` as `1:15`, `3675` as `1:01:15`."""
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  if hours:
    return f"{hours}:{minutes:02}:{seconds:02}"
  return f"{minutes}:{seconds:02}"


class Progress:
  """A tqdm bar on a terminal, one line per report elsewhere; process 0 only."""

  def __init__(
    self,
    total: int | None,
    *,
    start: int = 0,
    stream: io.TextIOBase | None = None,
  ):
    """Shows nothing yet.

    Args:
      total: steps of the whole run; None when another rule ends it.
      start: finished steps of the restored state.
      stream: by default standard error as it is now.
    """
    self._stream = sys.stderr if stream is None else stream
    self._total = total
    self._bar = None
    self._on = jax.process_index() == 0
    if self._on and self._stream.isatty():
      from tqdm import tqdm

      self._bar = tqdm(
        total=total,
        initial=start,
        file=self._stream,
        unit="step",
        dynamic_ncols=True,
      )

  def advance(self, step: int) -> None:
    """`step` steps are finished."""
    if self._bar is not None:
      self._bar.update(step - self._bar.n)

  def report(self, step: int, values: Mapping[str, float]) -> None:
    """Shows metrics at `step` finished steps."""
    if self._bar is not None:
      self._bar.set_postfix(describe(values))
      return
    if not self._on:
      return
    parts = [f"step {step}" + (f"/{self._total}" if self._total else "")]
    parts += [f"{label} {text}" for label, text in describe(values).items()]
    if self._total and "step_time_s" in values:
      left = (self._total - step) * values["step_time_s"]
      parts.append(f"eta {duration(max(left, 0))}")
    print("  ".join(parts), file=self._stream, flush=True)

  def note(self, text: str) -> None:
    """A line of its own that does not tear the bar."""
    if self._bar is not None:
      self._bar.write(text, file=self._stream)
    elif self._on:
      print(text, file=self._stream, flush=True)

  def close(self) -> None:
    if self._bar is not None:
      self._bar.close()
