"""What is asked of a run under way, by files in its workdir.

  touch WORKDIR/freeze_now   ends the first phase of a 1-bit optimizer
  touch WORKDIR/switch_now   throws the switch of a preconditioner

That is all that `optim.freeze_step="manual"` and
`optim.precondition.switch.threshold=None` wait for; other rules are overruled.
In a run of stages, or of a grid, it is the sub-run under way that is asked, and
the file moves to its folder. What cannot be done yet, such as a freeze before
the first step, waits; a run that has ended is asked nothing. A file stays, so
that a run that resumes from before it was followed follows it again.
"""

import pathlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from bertjax.hooks import When
from bertjax.optim import freeze_now, switch_now
from bertjax.optim.freezing import PhaseState
from bertjax.optim.preconditioning.switch import SwitchState
from bertjax.parallel import agreement, hosts


class Request(NamedTuple):
  """A row of `REQUESTS`.

  Attributes:
    part: of an optimizer state, that it is about.
    follow: what the state becomes; a ValueError says why not yet.
  """

  part: type
  follow: Callable[[Any], Any]


REQUESTS: dict[str, Request] = {
  "freeze_now": Request(PhaseState, freeze_now),
  "switch_now": Request(SwitchState, switch_now),
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
    self._open = [
      name
      for name, request in REQUESTS.items()
      if _holds(opt_state, request.part)
    ]

  def __call__(self, step: int, state: Any) -> Any:
    """The train state to go on with."""
    if not self._open or not self._when(step):
      return state
    there = [hosts.is_first() and self._there(name) for name in self._open]
    asked = agreement.told(sum(2**i for i, yes in enumerate(there) if yes))
    for i, name in enumerate(list(self._open)):
      if asked & 2**i:
        try:
          followed = REQUESTS[name].follow(state.opt_state)
        except ValueError as err:
          hosts.say(f"{name} at step {step} waits: {err}")
          continue
        hosts.say(f"{name} at step {step}: {self._workdir / name} is there.")
        state = state.replace(opt_state=followed)
        self._open.remove(name)
    return state

  def _there(self, name: str) -> bool:
    """Whether a file is there; one from above is this run's from now on."""
    own = self._workdir / name
    for folder in self._above:
      if not own.exists() and (folder / name).exists():
        (folder / name).rename(own)
    return own.exists()


def _holds(opt_state: Any, part: type) -> bool:
  def found(node):
    return isinstance(node, part)

  return any(map(found, jax.tree.leaves(opt_state, is_leaf=found)))
