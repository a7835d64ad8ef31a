"""What is asked of a run under way, by files in its workdir.

  touch WORKDIR/freeze_now   ends the first phase of a 1-bit optimizer
  touch WORKDIR/switch_now   throws the switch of a preconditioner

That is all that `optim.freeze_step="manual"` and
`optim.precondition.switch.threshold=None` wait for; other rules are overruled.
In a run of stages, or of a grid, it is the sub-run under way that is asked, and
the file moves to its folder. There it stays, so that a run that resumes from
before it was followed follows it again.
"""

import pathlib
from collections.abc import Callable
from typing import Any

import jax

from bertjax.hooks import When
from bertjax.optim import freeze_now, switch_now
from bertjax.parallel import agreement, hosts

# What the optimizer state becomes; a ValueError says that it has no such part.
REQUESTS: dict[str, Callable[[Any], Any]] = {
  "freeze_now": freeze_now,
  "switch_now": switch_now,
}


class Requests:
  """Follows each file once: process 0 looks, all do the same before a step."""

  def __init__(
    self,
    when: When,
    workdir: pathlib.Path,
    opt_state: Any,
    root: pathlib.Path | None = None,
  ):
    """Args:
    when: when to look, the same steps on every process; not often, as being
      told by process 0 waits for the devices.
    workdir: of the run.
    opt_state: of the run, possibly abstract; without a phase or a switch in it
      nobody ever looks.
    root: workdir of the stages or the grid that the run is part of.
    """
    self._when = when
    self._workdir = workdir
    self._above = [
      folder
      for folder in workdir.parents
      if root is not None and folder.is_relative_to(root)
    ]
    self._open = [name for name in REQUESTS if _applies(name, opt_state)]

  def __call__(self, step: int, state: Any) -> Any:
    """The train state to go on with."""
    if not self._open or not self._when(step):
      return state
    there = [hosts.is_first() and self._there(name) for name in self._open]
    asked = agreement.told(sum(2**i for i, yes in enumerate(there) if yes))
    for i, name in enumerate(list(self._open)):
      if asked & 2**i:
        hosts.say(f"{name} at step {step}: {self._workdir / name} is there.")
        state = state.replace(opt_state=REQUESTS[name](state.opt_state))
        self._open.remove(name)
    return state

  def _there(self, name: str) -> bool:
    """Whether a file is there; one from above is this run's from now on."""
    own = self._workdir / name
    for folder in self._above:
      if not own.exists() and (folder / name).exists():
        (folder / name).rename(own)
    return own.exists()


def _applies(name: str, opt_state: Any) -> bool:
  try:
    jax.eval_shape(REQUESTS[name], opt_state)
  except ValueError:
    return False
  return True
