"""gcp.tpu against a stand-in for gcloud, its commands run on mock hosts."""

import contextlib
import io
import itertools
import pathlib
import re
import shlex
import subprocess
import sys
import tarfile
import time
from unittest import mock

from absl.testing import absltest, parameterized

from bertjax import hardware
from bertjax.hardware.machines import machine_of
from gcp import queued_resource
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

  def test_shellcheck_finds_nothing_in_what_hosts_run(self):
    def everything(t):
      t.launch(["--config=it's"])
      t.statuses()
      t.logs()
      t.stop()

    folder = pathlib.Path(self.create_tempdir())
    for number, found in enumerate(_printed("v5e:4x4", everything)):
      (command,) = [a for a in found if a.startswith("--command=")]
      path = folder / f"{number}.sh"
      path.write_text(f"#!/bin/bash\n{command.removeprefix('--command=')}\n")
    subprocess.run([SHELLCHECK, *sorted(folder.iterdir())], check=True)
    self.assertLen(list(folder.iterdir()), 4)

  def test_gpus_are_refused(self):
    with self.assertRaisesRegex(ValueError, "no TPU.*gcp.jobs"):
      Tpu("bert", _machine("h100:8"), zone="z")


_EXISTS = "ERROR: (gcloud) ALREADY_EXISTS: Resource 'bert' already exists"
_QUOTA = "ERROR: (gcloud) RESOURCE_EXHAUSTED: Quota limit 'TPUV5s' exceeded"


class ErrorTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.commands = Commands(pathlib.Path(self.create_tempdir()) / "standins")
    self.tpu = Tpu("bert", _machine("v5e:4x4"), zone="z")

  def _failing(self, command, words, status=1):
    """gcloud fails at one command, after more words than are repeated."""
    self.commands.add(
      "gcloud",
      f'if [ "$4" = {command} ]; then seq 100 >&2; echo "{words}" >&2;'
      f" exit {status}; fi",
    )
    return self.commands.on_path()

  @parameterized.parameters(
    ("create", _QUOTA, lambda t: t.create()),
    ("create", _EXISTS, lambda t: t.create(spot=True)),
    ("describe", "PERMISSION_DENIED", lambda t: t.state()),
    ("scp", "No space left on device", lambda t: t.setup()),
    ("ssh", "no route to host", lambda t: t.setup()),
    ("ssh", "no route to host", lambda t: t.launch(["--config=c"])),
    ("ssh", "no route to host", lambda t: t.statuses()),
    ("ssh", "no route to host", lambda t: t.logs()),
    ("ssh", "no route to host", lambda t: t.stop()),
    ("delete", "FAILED_PRECONDITION", lambda t: t.delete()),
  )
  def test_a_command_that_fails_ends_it_with_gclouds_words(
    self, command, words, call
  ):
    said = io.StringIO()
    with (
      self._failing(command, words, status=3),
      contextlib.redirect_stderr(said),
      self.assertRaises(GcloudError) as caught,
    ):
      call(self.tpu)
    self.assertRegex(str(caught.exception), f" {command} .* with status 3:")
    self.assertEndsWith(str(caught.exception), f"\n100\n{words}")
    self.assertLess(len(str(caught.exception)), 300)
    # They were shown as they came, but for those of a look.
    shown = "" if command == "describe" else f"100\n{words}\n"
    self.assertEndsWith(said.getvalue(), shown)
    self.assertEqual(self.commands.calls()[-1][4], command)  # and no more

  def test_gcloud_that_says_nothing(self):
    self.commands.add("gcloud", "exit 2")
    with (
      self.commands.on_path(),
      self.assertRaisesRegex(GcloudError, "status 2: it did not say why"),
    ):
      self.tpu.delete()

  def test_an_error_is_the_last_line_and_the_status(self):
    with self._failing("create", _QUOTA):
      done = subprocess.run(
        [sys.executable, "-m", "gcp.tpu", "create", "--name=bert",
         "--topology=v5e:4x4", "--zone=z"],
        cwd=_ROOT,
        env=self.commands.environment(JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
        check=False,
      )  # fmt: skip
    self.assertEqual(done.returncode, 1)
    self.assertIn("Error: gcloud compute tpus queued-resources create bert",
                  done.stderr)  # fmt: skip
    self.assertEndsWith(done.stderr, f"{_QUOTA}\n")
    self.assertNotIn("Traceback", done.stderr)

  def test_a_dry_run_prints_and_runs_nothing(self):
    done = subprocess.run(
      [sys.executable, "-m", "gcp.tpu", "delete", "--name=bert",
       "--topology=v5e:4x4", "--zone=z", "--dry-run"],
      cwd=_ROOT,
      env=self.commands.environment(JAX_PLATFORMS="cpu"),
      capture_output=True,
      text=True,
      check=True,
    )  # fmt: skip
    self.assertIn("queued-resources delete bert", done.stdout)
    self.assertEmpty(self.commands.calls())


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
      '  --command=*) bash -c "${argument#--command=}" || exit ;;\n'
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
    self._wait_for("stopped")
    self._launch("exit 143")  # by the machine's own end: nobody's wish
    self._wait_for("143")

  def test_stop_of_nothing_fails_and_leaves_no_note(self):
    with self.assertRaises(GcloudError):
      self.tpu.stop()
    (self.home / "bertjax-run.status").write_text("3\n")
    self.assertEqual(self.tpu.statuses(), ["3"])

  def test_a_run_that_vanished_is_lost(self):
    self._launch("sleep 60")
    self._wait_for("running")
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
    # With the readers of configs/bert.py's corpora, which the README runs.
    self.assertIn(
      ["pip", "-m", "pip", "install", "--quiet", "-e", ".[tpu,tfds]"], calls
    )
    (mount, *_) = [c for c in calls if c[0] == "gcsfuse"]
    self.assertEqual(mount[-2:], ["bucket", "/mnt/x"])

  def test_shellcheck(self):
    script = _ROOT / "gcp" / "setup_host.sh"
    subprocess.run([SHELLCHECK, script], check=True)


class WatchTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.commands = Commands(pathlib.Path(self.create_tempdir()) / "standins")
    self.commands.add("gcloud")
    self.enter_context(self.commands.on_path())
    self.said = io.StringIO()
    self.enter_context(contextlib.redirect_stdout(self.said))
    self.enter_context(contextlib.redirect_stderr(self.said))

  def _watch(self, states, statuses, max_restarts=5, **others):
    """Runs `watch`; answers in turn, the last ones again and again.

    Those that begin with an exclamation mark are errors.
    """
    answers = {name: [""] for name in ("create", "scp", "delete", "launch")}
    answers |= {"describe": states, "statuses": statuses} | others
    for name, lines in answers.items():
      (self.commands.folder / name).write_text("\n".join(lines) + "\n")
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
      "  describe*|create*|scp*|delete*) take $4 ;;\n"
      "  ssh*status=*) take statuses status= ;;\n"
      "  ssh*bertjax.train*) take launch ;;\n"
      "esac",
    )
    looks = itertools.count()
    with mock.patch.object(
      tpu_lib.time, "sleep", lambda s: self.assertLess(next(looks), 50)
    ):
      self.done = tpu_lib.watch(
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

  def test_a_run_that_is_stopped_meanwhile_is_left_alone(self):
    found = self._watch(
      ["ACTIVE"], ["running running", "running stopped", "stopped stopped"]
    )
    self.assertEmpty(found)
    self.assertFalse(self.done)
    found = self._watch(
      ["ACTIVE"], ["none none", "0 stopped", "running running"]
    )
    self.assertEqual(found, ["setup", "launch"])
    self.assertFalse(self.done)

  def test_a_run_that_was_stopped_before_goes_on(self):
    found = self._watch(
      ["ACTIVE"], ["stopped stopped", "running running", "0 0"], max_restarts=0
    )
    self.assertEqual(found, ["launch"])
    self.assertTrue(self.done)

  def test_restarts_have_an_end(self):
    with self.assertRaisesRegex(RuntimeError, "status 1; --max_restarts=2"):
      self._watch(["ACTIVE"], ["1 1"], max_restarts=2)
    self.assertEqual(self._actions(), ["launch"] * 2)

  def test_a_restart_that_takes_several_attempts_is_one(self):
    found = self._watch(
      ["ACTIVE", "SUSPENDED", "SUSPENDED", "!NOT_FOUND: gone", "ACTIVE"],
      ["running running", "none none", "1 1", "1 1", "0 0"],
      delete=["!SUSPENDING: try again", ""],
      launch=["", "!ssh: no route", ""],
      max_restarts=2,
    )
    self.assertEqual(
      found, ["delete"] * 2 + ["create", "setup"] + ["launch"] * 3
    )
    self.assertEqual(
      re.findall(r"restart \d of 2", self.said.getvalue()),
      ["restart 1 of 2", "restart 2 of 2"],
    )

  def test_hosts_that_never_answer_end_it(self):
    with self.assertRaisesRegex(GcloudError, "ended with status 1"):
      self._watch(["ACTIVE"], ["!ssh: no route"])

  def test_a_preemption_while_hosts_are_set_up_is_one_like_others(self):
    found = self._watch(
      ["!NOT_FOUND: no", *["ACTIVE"] * 2, "SUSPENDED", "!NOT_FOUND: gone",
       "!UNAVAILABLE: try again", "ACTIVE"],
      ["none none"] * 2 + ["none none", "0 0"],
      scp=["!ssh: connection closed", "!ssh: no route", ""],
    )  # fmt: skip
    self.assertEqual(found, ["create", "delete", "create", "setup", "launch"])
    for words in ("connection closed", "restart 1 of 5", "UNAVAILABLE"):
      self.assertIn(words, self.said.getvalue())

  def test_without_a_commit_nothing_is_rented(self):
    folder = pathlib.Path(self.create_tempdir())
    with (
      mock.patch.object(queued_resource, "_ROOT", folder),
      self.assertRaisesRegex(ValueError, f"{folder} .*not a git repository"),
    ):
      self._watch(["!NOT_FOUND: no"], ["none"])
    self.assertEqual(self._actions(), [])

  @parameterized.parameters("launch", "watch")
  def test_a_config_that_hosts_would_not_get_is_refused(self, command):
    folder = pathlib.Path(self.create_tempdir())
    who = ["-c", "user.name=me", "-c", "user.email=me@here"]
    for arguments in (["init"], [*who, "commit", "--allow-empty", "-m", "x"]):
      subprocess.run(
        ["git", *arguments], cwd=folder, check=True, capture_output=True
      )
    tpu = Tpu("bert", _machine("v5e:4x4"), zone="z")
    given = mock.Mock(workdir="w", config="configs/nosuch.py:base")
    with self.assertRaisesRegex(ValueError, "there is no file configs/nosuch"):
      tpu_lib._run(tpu, command, [], given)
    given.config = "configs/bert.py:base"  # in another folder's last commit
    with (
      mock.patch.object(queued_resource, "_ROOT", folder),
      self.assertRaisesRegex(
        ValueError, f"configs/bert.py is not in the last commit of {folder}"
      ),
    ):
      tpu_lib._run(tpu, command, [], given)
    self.assertEqual(self._actions(), [])
    given.config = "/mnt/shared/mine.py"
    tpu_lib._run(tpu, "launch", [], given)
    self.assertEqual(self._actions(), ["launch"])

  @parameterized.parameters(_QUOTA, _EXISTS)
  def test_a_first_request_that_is_refused_ends_it(self, words):
    with self.assertRaisesRegex(GcloudError, re.escape(words)):
      self._watch(["!NOT_FOUND: no"], ["none"], create=[f"!{words}"])
    self.assertEqual(self._actions(), ["create"])

  def test_a_later_request_that_is_refused_is_made_again(self):
    found = self._watch(
      ["FAILED", *["!NOT_FOUND: no"] * 3, "ACTIVE"],
      ["none none", "0 0"],
      create=[f"!{_QUOTA}", f"!{_EXISTS}", ""],
    )
    self.assertEqual(found, ["delete", *["create"] * 3, "setup", "launch"])

  def test_setting_up_is_not_tried_for_ever(self):
    with self.assertRaisesRegex(GcloudError, " scp .*: no disk"):
      self._watch(["ACTIVE"], ["none none"], scp=["!no disk"])
    self.assertEqual(self._actions(), [])

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

  @parameterized.parameters(
    ("echo CREATING", "waiting\n"),
    ("echo SUSPENDED", "gone\n"),
    ("echo NOT_FOUND >&2; exit 1", "absent\n"),
  )
  def test_status_asks_no_hosts_that_are_not_there(self, describe, told):
    self.commands.add("gcloud", f"[ $4 = describe ] || exit 1\n{describe}")
    tpu = Tpu("a", _machine("v5e:2x2"), zone="z")
    tpu_lib._run(tpu, "status", [], mock.Mock())
    self.assertEqual(self.said.getvalue(), told)

  def test_status_tells_the_state_whatever_the_hosts_say(self):
    tpu = Tpu("a", _machine("v5e:2x2"), zone="z")
    self.commands.add(
      "gcloud", "[ $4 = describe ] && echo ACTIVE || echo status=running"
    )
    tpu_lib._run(tpu, "status", [], mock.Mock())
    self.assertEqual(self.said.getvalue(), "active\nrunning\n")
    self.commands.add("gcloud", "[ $4 = describe ] && echo ACTIVE")
    with self.assertRaises(GcloudError):
      tpu_lib._run(tpu, "status", [], mock.Mock())
    self.assertEndsWith(self.said.getvalue(), "\nactive\n")


if __name__ == "__main__":
  absltest.main()
