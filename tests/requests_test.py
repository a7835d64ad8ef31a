"""What files in the workdir ask of a run under way."""

import dataclasses
import pathlib
import tempfile
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from absl.testing import absltest

from bertjax import requests, train
from bertjax.config import settings
from bertjax.hooks import Every
from bertjax.optim import build_optimizer
from bertjax.optim.freezing import PhaseState
from bertjax.optim.preconditioning.switch import SwitchState
from bertjax.parallel import agreement
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_device")


@dataclasses.dataclass
class State:
  opt_state: Any

  def replace(self, opt_state):
    return State(opt_state)


def _nodes(opt_state, kind):
  def found(node):
    return isinstance(node, kind)

  return [x for x in jax.tree.leaves(opt_state, is_leaf=found) if found(x)]


def _optimizer(**options):
  params = {"dense": {"kernel": jnp.ones((3, 5)), "bias": jnp.ones(5)}}
  spec = dict(name="lamb", learning_rate=0.1) | options
  built = build_optimizer(
    spec, total_steps=9, params=params, linear_layers=lambda: {"dense": 1}
  )
  return built.transform, params


def _opt_state(**options):
  transform, params = _optimizer(**options)
  return transform.init(params)


class RequestsTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))
    manual = dict(name="mkor", switch=dict(threshold=None))
    self.state = State(_opt_state(precondition=manual))

  def follow(self, opt_state=None):
    opt_state = self.state.opt_state if opt_state is None else opt_state
    return requests.Requests(Every(3), self.folder, opt_state)

  def on(self, state):
    (switch,) = _nodes(state.opt_state, SwitchState)
    return bool(switch.on)

  def test_looks_when_it_is_due_and_follows_once(self):
    amend = self.follow()
    self.assertFalse(self.on(amend(3, self.state)))
    (self.folder / "switch_now").touch()
    for step in (4, 5):
      self.assertIs(amend(step, self.state), self.state)
    amended = amend(6, self.state)
    self.assertTrue(self.on(amended))
    self.assertIs(amend(9, amended), amended)

  def test_in_the_folder_above_it_asks_the_run_under_way(self):
    for name in ("point/a", "point/b", "other"):
      (self.folder / name).mkdir(parents=True)
    a, b, other = (
      requests.Requests(
        Every(3), self.folder / name, self.state.opt_state, self.folder
      )
      for name in ("point/a", "point/b", "other")
    )
    for above in (self.folder / "point", self.folder):
      (above / "switch_now").touch()
      run = a if above != self.folder else other
      self.assertTrue(self.on(run(3, self.state)))
      self.assertFalse(self.on(b(3, self.state)))
    for name in ("point/a", "other"):  # as often as it resumes
      again = requests.Requests(
        Every(3), self.folder / name, self.state.opt_state, self.folder
      )
      self.assertTrue(self.on(again(3, self.state)))

  def test_beside_the_run_it_asks_nothing(self):
    (self.folder / "run").mkdir()
    (self.folder / "switch_now").touch()
    run = self.folder / "run"
    for root in (None, run):
      amend = requests.Requests(Every(3), run, self.state.opt_state, root)
      self.assertFalse(self.on(amend(3, self.state)))

  def test_what_cannot_be_done_yet_waits(self):
    """Before the first step there is no variance to freeze."""
    transform, params = _optimizer(name="onebit_adam", freeze_step="manual")
    state = State(transform.init(params))
    amend = self.follow(state.opt_state)
    (self.folder / "freeze_now").touch()
    self.assertIs(amend(3, state), state)
    _, moved = transform.update(params, state.opt_state, params)
    (phase,) = _nodes(amend(6, State(moved)).opt_state, PhaseState)
    self.assertTrue(phase.frozen)

  def test_process_0_decides(self):
    asked = []
    first = mock.patch.object(requests.hosts, "is_first", lambda: False)

    def told(value, said):
      asked.append(value)
      return said

    with mock.patch.object(agreement, "told", lambda v: told(v, 1)):
      self.assertTrue(self.on(self.follow()(3, self.state)))  # it sees no file
    (self.folder / "switch_now").touch()
    with mock.patch.object(agreement, "told", lambda v: told(v, 0)):
      self.assertFalse(self.on(self.follow()(3, self.state)))
    with first, mock.patch.object(agreement, "told", lambda v: told(v, 0)):
      self.follow()(3, self.state)
    self.assertEqual(asked, [0, 1, 0])

  def test_runs_without_phase_or_switch_do_not_wait_for_each_other(self):
    (self.folder / "freeze_now").touch()
    with mock.patch.object(agreement, "told") as told:
      amend = self.follow(_opt_state())
      self.assertIs(amend(3, self.state), self.state)
    told.assert_not_called()

  def test_a_run_of_train_freezes_when_the_file_is_there(self):
    stage, workdir = settings(self.config()), self.folder / "run"
    frozen = []
    for limit in (2, 2):
      result = train.run(stage, workdir, limit=limit)
      frozen.append(self.frozen(result))
      (workdir / "freeze_now").touch()
    self.assertEqual(frozen, [[False], [True]])
    self.assertEqual(result.step, 4)

  def test_the_first_stage_does_it_alone(self):
    """Asked in the folder that the user knows."""
    workdir = self.folder / "staged"
    workdir.mkdir()
    (workdir / "freeze_now").touch()
    self.assertEqual(self.staged(workdir, 2, 2), [[True], [False]])

  def test_a_stage_that_is_done_leaves_it_to_the_one_under_way(self):
    workdir = self.folder / "staged"
    self.assertEqual(self.staged(workdir, 2, 2), [[False], [False]])
    (workdir / "freeze_now").touch()
    self.assertEqual(self.staged(workdir, 2, 4), [[False], [True]])
    self.assertTrue((workdir / "b" / "freeze_now").exists())

  def config(self):
    tiny.write_corpus(self.folder)
    self.enterContext(mock.patch.object(train.report, "write_report"))
    return tiny.small(
      self.folder,
      optim=dict(
        name="onebit_adam",
        learning_rate=1e-3,
        clip_norm=1.0,
        freeze_step="manual",
      ),
      evals=dict(heldout=dict(every=50)),
    )

  def staged(self, workdir, *steps):
    """What is frozen at the end of each of the stages."""
    frozen, run = [], train.run

    def noted(*arguments, **options):
      result = run(*arguments, **options)
      frozen.append(self.frozen(result))
      return result

    stages = {name: dict(stop=dict(steps=n)) for name, n in zip("ab", steps)}
    with mock.patch.object(train, "run", noted):
      train.train(self.config() | dict(stages=stages), workdir)
    return frozen

  def frozen(self, result):
    phases = _nodes(result.state.opt_state, PhaseState)
    return [bool(phase.frozen) for phase in phases]


if __name__ == "__main__":
  absltest.main()
