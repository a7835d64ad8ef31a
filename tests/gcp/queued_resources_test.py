"""gcp.tpu against a stand-in for gcloud, its commands run on mock hosts."""

import contextlib
import io
import itertools
import pathlib
import re
import shlex
import subprocess
import tarfile
import time
from unittest import mock

from absl.testing import absltest, parameterized

from bertjax import hardware
from bertjax.hardware.machines import machine_of
from gcp import tpu as tpu_lib
from gcp.queued_resource import GcloudError, State, Tpu
from tests.gcp.standins import SHELLCHECK, Commands

_ROOT = pathlib.Path(__file__).parents[2]
# `gcloud compute tpus queued-resources COMMAND --help`, of those used.
_FLAGS = {
  "create": "runtime-version accelerator-type topology type node-id node-count"
  " node-prefix spot reserved service-account network zone project",
  "describe": "format zone project",
  "delete": "force quiet zone project",
  "ssh": "node worker command zone project",
  "scp": "node worker zone project",
}


def _machine(topology):
  return machine_of(hardware.parse(topology))


def _printed(topology, call, **options):
  """gcloud's arguments that a dry run prints."""
  out = io.StringIO()
  with contextlib.redirect_stdout(out):
    call(Tpu("bert", _machine(topology), zone="z", dry_run=True, **options))
  commands = [shlex.split(c) for c in _commands(out.getvalue())]
  return [c[4:] for c in commands if c[0] == "gcloud"]


def _commands(text):
  """Lines, but a quoted one may have several."""
  commands, held = [], ""
  for line in text.splitlines(keepends=True):
    held += line
    with contextlib.suppress(ValueError):
      shlex.split(held)
      commands.append(held)
      held = ""
  return commands


class DryRunTest(parameterized.TestCase):
  @parameterized.parameters(
    ("v5e:4x4", ["--accelerator-type=v5litepod-16",
                 "--runtime-version=v2-alpha-tpuv5-lite", "--node-id=bert"]),
    ("2xv6e:16x16", ["--accelerator-type=v6e-256",
                     "--runtime-version=v2-alpha-tpuv6e", "--node-count=2",
                     "--node-prefix=bert"]),
    ("v5p:2x2x4", ["--type=v5p", "--topology=2x2x4",
                   "--runtime-version=v2-alpha-tpuv5", "--node-id=bert"]),
  )  # fmt: skip
  def test_create_asks_for_the_topology(self, topology, wanted):
    (found,) = _printed(topology, lambda t: t.create(spot=True), project="p")
    self.assertEqual(
      found, ["create", "bert", *wanted, "--spot", "--zone=z", "--project=p"]
    )

  def test_every_flag_is_one_of_gclouds(self):
    def everything(t):
      t.create(spot=True, reserved=True, service_account="s", network="n")
      t.state()
      t.setup("b")
      t.launch(["--config=c"])
      t.statuses()
      t.logs()
      t.stop()
      t.delete()

    found = _printed("v5e:4x4", everything, project="p")
    self.assertEqual({c for c, *_ in found}, set(_FLAGS))
    for command, *arguments in found:
      flags = re.findall(
        r"^--([\w-]+)", "\n".join(a.split("\n")[0] for a in arguments), re.M
      )
      self.assertContainsSubset(flags, _FLAGS[command].split())

  def test_gpus_are_refused(self):
    with self.assertRaisesRegex(ValueError, "no TPU.*gcp.jobs"):
      Tpu("bert", _machine("h100:8"), zone="z")


class HostsTest(absltest.TestCase):
  """What is sent to a host does there what it should."""

  def setUp(self):
    super().setUp()
    self.home = pathlib.Path(self.create_tempdir())
    (self.home / "bertjax" / ".venv" / "bin").mkdir(parents=True)
    self.commands = Commands(self.home / "standins")
    # ssh: runs the command of each host, here two that share a home.
    self.commands.add(
      "gcloud",
      f"cd {self.home}\n"
      'for argument; do case "$argument" in\n'
      '  --command=*) bash -c "${argument#--command=}" ;;\n'
      "esac; done",
    )
    self.enter_context(self.commands.on_path())
    self.tpu = Tpu("bert", _machine("v5e:2x2"), zone="z")

  def _launch(self, program):
    python = self.home / "bertjax" / ".venv" / "bin" / "python"
    python.write_text(f"#!/bin/bash\n{program}\n")
    python.chmod(0o755)
    self.tpu.launch(["--config=a b.py", "--workdir=w"])

  def _wait_for(self, status):
    deadline = time.monotonic() + 20
    while self.tpu.statuses() != [status] and time.monotonic() < deadline:
      time.sleep(0.05)
    self.assertEqual(self.tpu.statuses(), [status])

  def test_status_follows_the_run(self):
    self.assertEqual(self.tpu.statuses(), ["none"])
    self._launch('printf "%s|" "$@"; while [ ! -e end ]; do sleep 0.05; done')
    self.assertEqual(self.tpu.statuses(), ["running"])
    (self.home / "bertjax" / "end").touch()
    self._wait_for("0")
    log = (self.home / "bertjax-run.log").read_text()
    self.assertEqual(log, "-m|bertjax.train|--config=a b.py|--workdir=w|")
    self._launch("exit 7")
    self._wait_for("7")

  def test_stop_lets_the_run_save_and_notes_its_status(self):
    self._launch(
      "trap 'sleep 0.3; exit 143' TERM; touch ready; sleep 60 & wait"
    )
    while not (self.home / "bertjax" / "ready").exists():
      time.sleep(0.05)
    self.tpu.stop()
    self._wait_for("143")

  def test_a_run_that_vanished_is_lost(self):
    self._launch("sleep 60")
    pid = int((self.home / "bertjax-run.pid").read_text())
    subprocess.run(["kill", "-KILL", "--", f"-{pid}"], check=True)
    self._wait_for("lost")


class SetupTest(absltest.TestCase):
  def test_the_host_unpacks_installs_and_mounts(self):
    home = pathlib.Path(self.create_tempdir())
    commands = Commands(home / "standins")
    commands.add("sudo", "cat > /dev/null")
    commands.add("mountpoint", "exit 1")
    commands.add("gcsfuse")
    commands.add(
      "python3.11",
      f"mkdir -p .venv/bin\nln -sf {commands.folder}/bin/pip .venv/bin/python",
    )
    commands.add("pip")
    with tarfile.open(home / "code.tar.gz", "w:gz") as archive:
      archive.add(_ROOT / "setup.py", "setup.py")
    script = _ROOT / "gcp" / "setup_host.sh"
    for _ in range(2):  # again is harmless
      subprocess.run(
        ["bash", script, "code", "/mnt/x", "gs://bucket"],
        cwd=home,
        env=commands.environment(),
        check=True,
        stdin=subprocess.DEVNULL,
      )
    self.assertTrue((home / "code" / "setup.py").exists())
    calls = commands.calls()
    self.assertIn(["pip", "-m", "pip", "install", "--quiet", "-e", ".[tpu]"],
                  calls)  # fmt: skip
    (mount, *_) = [c for c in calls if c[0] == "gcsfuse"]
    self.assertEqual(mount[-2:], ["bucket", "/mnt/x"])

  def test_shellcheck(self):
    script = _ROOT / "gcp" / "setup_host.sh"
    subprocess.run([SHELLCHECK, script], check=True)


class WatchTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.commands = Commands(pathlib.Path(self.create_tempdir()) / "standins")
    self.enter_context(self.commands.on_path())
    self.said = io.StringIO()
    self.enter_context(contextlib.redirect_stdout(self.said))
    self.enter_context(contextlib.redirect_stderr(self.said))

  def _watch(self, states, statuses, max_restarts=5):
    """Runs `watch`; states and statuses are the answers in turn, the last
    ones again and again."""
    for name, answers in (("describe", states), ("statuses", statuses)):
      (self.commands.folder / name).write_text("\n".join(answers) + "\n")
    self.commands.add(
      "gcloud",
      f"cd {self.commands.folder}\n"
      "take() {\n"
      "  answer=$(head -n 1 $1)\n"
      "  (( $(wc -l < $1) > 1 )) && sed -i 1d $1\n"
      '  if [[ $answer == !* ]]; then echo "${answer#!}" >&2; exit 1; fi\n'
      "  for word in $answer; do echo $2$word; done\n"
      "}\n"
      'case "$4 $*" in\n'
      "  describe*) take describe ;;\n"
      "  ssh*echo\\ status*) take statuses status= ;;\n"
      "esac",
    )
    looks = itertools.count()
    with mock.patch.object(
      tpu_lib.time, "sleep", lambda s: self.assertLess(next(looks), 50)
    ):
      tpu_lib.watch(
        Tpu("bert", _machine("2xv5e:4x4"), zone="z"),
        ["--config=c"],
        create=dict(spot=True),
        bucket="b",
        max_restarts=max_restarts,
        poll_s=60.0,
      )
    return self._actions()

  def _actions(self):
    """What was done, looks aside."""
    found = []
    for _, *arguments in self.commands.calls():
      action, text = arguments[3], " ".join(arguments)
      if action == "ssh":
        action = (
          "setup" if "SETUP" in text
          else "launch" if "bertjax.train" in text
          else "describe"
        )  # fmt: skip
      if action not in ("describe", "scp"):
        found.append(action)
    return found

  def test_from_nothing_through_a_preemption_to_the_end(self):
    found = self._watch(
      ["!NOT_FOUND: no such thing", "WAITING_FOR_RESOURCES", "PROVISIONING",
       *["ACTIVE"] * 3, "SUSPENDING", "SUSPENDED", "!NOT_FOUND: gone",
       "ACTIVE"],
      ["none none", "running running", "!ssh: no route", "none none",
       "running running", "running 0", "0 0"],
    )  # fmt: skip
    once = ["create", "setup", "launch"]
    self.assertEqual(found, [*once, "delete", *once])
    self.assertIn("taken away; restart 1 of 5", self.said.getvalue())

  def test_a_failed_run_starts_again_without_setting_up(self):
    found = self._watch(["ACTIVE"], ["1 lost", "running running", "0 0"])
    self.assertEqual(found, ["launch"])

  def test_restarts_have_an_end(self):
    with self.assertRaisesRegex(RuntimeError, "status 1; --max_restarts=2"):
      self._watch(["ACTIVE"], ["1 1"], max_restarts=2)
    self.assertEqual(self._actions(), ["launch"] * 2)

  def test_hosts_that_never_answer_end_it(self):
    with self.assertRaisesRegex(GcloudError, "ended with status 1"):
      self._watch(["ACTIVE"], ["!ssh: no route"])

  def test_other_errors_of_gcloud_delete_nothing(self):
    with self.assertRaisesRegex(GcloudError, "PERMISSION_DENIED"):
      self._watch(["!PERMISSION_DENIED: not yours"], ["none"])
    self.assertEqual(self._actions(), [])

  def test_an_unknown_state_is_waited_for(self):
    self.assertEqual(self._watch(["NEW_ONE", "ACTIVE"], ["0 0"]), [])

  @parameterized.parameters(
    ("ACTIVE", State.ACTIVE), ("SUSPENDED", State.GONE), ("FAILED", State.GONE)
  )
  def test_states(self, said, state):
    self.commands.add("gcloud", f"echo {said}")
    self.assertIs(Tpu("a", _machine("v5e:2x2"), zone="z").state(), state)


if __name__ == "__main__":
  absltest.main()
