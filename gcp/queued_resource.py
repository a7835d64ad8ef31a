"""A queued resource of TPUs and the hosts that come of it, by gcloud."""

import collections
import enum
import pathlib
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence

from bertjax.hardware.machines import Machine

_ROOT = pathlib.Path(__file__).parents[1]
_HOME = "bertjax"  # the checkout, in the home folder of each host
_LOG, _STATUS, _PID, _STOP = (
  f"{_HOME}-run.{end}" for end in ("log", "status", "pid", "stop")
)
MOUNT = "/mnt/shared"
RUNNING, STOPPED = "running", "stopped"
_LAST_WORDS = 10  # lines of gcloud's that an error repeats


class GcloudError(RuntimeError):
  """gcloud failed; the message is its own last words."""


class State(enum.StrEnum):
  """Of a queued resource, as far as it matters here."""

  WAITING = "waiting"
  ACTIVE = "active"
  GONE = "gone"
  ABSENT = "absent"


# cloud.google.com/tpu/docs/queued-resources: a preempted resource becomes
# SUSPENDED and is never served again.
_STATES = {
  "CREATING": State.WAITING,
  "ACCEPTED": State.WAITING,
  "WAITING_FOR_RESOURCES": State.WAITING,
  "PROVISIONING": State.WAITING,
  "DELETING": State.WAITING,
  "SUSPENDING": State.WAITING,
  "ACTIVE": State.ACTIVE,
  "SUSPENDED": State.GONE,
  "FAILED": State.GONE,
}


_PACKING = ("git", "archive", "--format=tar.gz", "HEAD")


def _git(command: Sequence[str], refusal: str) -> bytes:
  """What git prints; ValueError of the refusal and its words if it fails."""
  try:
    return subprocess.run(
      command, cwd=_ROOT, check=True, capture_output=True
    ).stdout
  except FileNotFoundError as err:
    raise ValueError("git, which packs what hosts get, is missing.") from err
  except subprocess.CalledProcessError as err:
    words = err.stderr.decode(errors="replace").strip()
    raise ValueError(f"{refusal}; git says: {words}") from err


def packed() -> bytes:
  """This checkout's last commit, as .tar.gz.

  Raises:
    ValueError: git's words, as there is none.
  """
  return _git(_PACKING, f"{_ROOT} has no commit that hosts could get")


def check_packed(path: str) -> None:
  """Refuses a file of the checkout that `packed` lacks.

  Args:
    path: from the checkout; an absolute one is for the hosts to find.

  Raises:
    ValueError: git's words, as the last commit does not have it.
  """
  if not pathlib.Path(path).is_absolute():
    _git(
      ("git", "cat-file", "-e", f"HEAD:./{path}"),
      f"--config={path} is not in the last commit of {_ROOT}, which is what"
      " hosts get: commit it",
    )


class Tpu:
  """A queued resource, and the hosts that come of it."""

  def __init__(
    self,
    name: str,
    machine: Machine,
    *,
    zone: str,
    project: str | None = None,
    dry_run: bool = False,
  ):
    """Knows its name; touches nothing.

    Args:
      name: of the queued resource, and of its nodes.
      machine: what is asked for.
      zone: where.
      project: whose; gcloud's default otherwise.
      dry_run: print what would be run.

    Raises:
      ValueError: the topology is none of TPUs.
    """
    if not machine.on_tpu:
      raise ValueError(
        f"topology: {machine.gke_accelerator} is no TPU; for GPUs see"
        " `python -m gcp.jobs`."
      )
    self._name, self._machine, self._dry_run = name, machine, dry_run
    self._where = [f"--zone={zone}"]
    if project is not None:
      self._where.append(f"--project={project}")

  def _gcloud(self, *arguments: str, quiet: bool = False) -> str:
    """Runs gcloud on queued resources; gives what it printed."""
    command = ["gcloud", "compute", "tpus", "queued-resources", *arguments]
    command += self._where
    if self._dry_run:
      print(shlex.join(command))
      return ""
    with tempfile.TemporaryFile("w+") as out:
      process = subprocess.Popen(
        command, stdout=out, stderr=subprocess.PIPE, text=True
      )
      words: collections.deque[str] = collections.deque(maxlen=_LAST_WORDS)
      with process:
        for line in process.stderr:
          words.append(line)
          if not quiet:  # it may take minutes
            print(line, end="", file=sys.stderr, flush=True)
      if process.returncode:
        raise GcloudError(
          f"{shlex.join(command[:6])} ended with status {process.returncode}:"
          f" {''.join(words).strip() or 'it did not say why'}"
        )
      out.seek(0)
      return out.read()

  def _ssh(self, command: str, *, first: bool = False) -> str:
    """Runs a command on all hosts of all slices at once, or on the first."""
    which = "0" if first else "all"
    return self._gcloud(
      "ssh", self._name, f"--node={which}", f"--worker={which}",
      f"--command={command}",
    )  # fmt: skip

  def create(
    self,
    *,
    spot: bool = False,
    reserved: bool = False,
    service_account: str | None = None,
    network: str | None = None,
  ) -> None:
    """Asks for the TPUs; `state` tells when they are there."""
    machine = self._machine
    if machine.shape.count("x") == 2:  # v4-32 is 2x2x4 as well as 2x4x2
      what = [f"--type={machine.tpu_type}", f"--topology={machine.shape}"]
    else:
      what = [f"--accelerator-type={machine.accelerator_type}"]
    nodes = [f"--node-id={self._name}"]
    if machine.slices > 1:
      nodes = [f"--node-count={machine.slices}", f"--node-prefix={self._name}"]
    options = {
      "--spot": spot,
      "--reserved": reserved,
      f"--service-account={service_account}": service_account,
      f"--network={network}": network,
    }
    self._gcloud(
      "create",
      self._name,
      *what,
      f"--runtime-version={machine.runtime_version}",
      *nodes,
      *(flag for flag, given in options.items() if given),
    )

  def state(self) -> State:
    """What has become of the request."""
    try:
      said = self._gcloud(
        "describe", self._name, "--format=value(state.state)", quiet=True
      )
    except GcloudError as err:
      if "NOT_FOUND" in str(err):
        return State.ABSENT
      raise
    # A state that is not known yet is no reason to delete anything.
    return _STATES.get(said.strip(), State.WAITING)

  def setup(self, bucket: str | None = None) -> None:
    """Copies this checkout's last commit to all hosts and installs it.

    Args:
      bucket: of Cloud Storage, to mount as /mnt/shared; without it a file
        system that the hosts share must be mounted otherwise.

    Raises:
      ValueError: there is no commit.
    """
    script = (_ROOT / "gcp" / "setup_host.sh").read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
      archive = pathlib.Path(folder) / f"{_HOME}.tar.gz"
      if self._dry_run:
        print(shlex.join(_PACKING), ">", archive)
      else:
        archive.write_bytes(packed())
      self._gcloud(
        "scp", str(archive), f"{self._name}:", "--node=all", "--worker=all"
      )
    arguments = shlex.join([_HOME, MOUNT, bucket or ""])
    self._ssh(f"bash -s -- {arguments} <<'SETUP'\n{script}\nSETUP")

  def launch(self, arguments: Sequence[str]) -> None:
    """Starts training on all hosts, where it goes on without this machine.

    Args:
      arguments: of `bertjax.train`.
    """
    train = shlex.join([".venv/bin/python", "-m", "bertjax.train", *arguments])
    # `stop` signals the shell as well; it waits for its child, then notes.
    run = f"trap : TERM; {train}; echo $? > ../{_STATUS}"
    self._ssh(
      f"cd {_HOME} && rm -f ../{_STOP} && echo {RUNNING} > ../{_STATUS}"
      f" && (setsid nohup bash -c {shlex.quote(run)} >> ../{_LOG} 2>&1"
      f" < /dev/null & echo $! > ../{_PID})"
    )

  def statuses(self) -> list[str]:
    """Of the hosts' runs: "running", an exit status, "lost" or "none".

    One that was asked to `stop` and did not end with 0 is "stopped".
    """
    # A host that was started anew holds what its predecessor said.
    said = self._ssh(
      f"s=$(cat {_STATUS} 2>/dev/null || echo none);"
      f' if [ "$s" = {RUNNING} ] && ! kill -0 -- "-$(cat {_PID})" 2>/dev/null;'
      # It may have ended just now, and noted it.
      f' then s=$(cat {_STATUS}); [ "$s" != {RUNNING} ] || s=lost; fi;'
      f' if [ "$s" != {RUNNING} ] && [ "$s" != 0 ] && [ -e {_STOP} ];'
      f" then s={STOPPED}; fi;"
      ' echo "status=$s"'
    )
    return [
      line.removeprefix("status=")
      for line in said.split()
      if line.startswith("status=")
    ]

  def logs(self, lines: int = 50) -> None:
    """Prints the end of the first host's log: process 0 does the talking."""
    print(self._ssh(f"tail -n {lines} {_LOG}", first=True), end="")

  def stop(self) -> None:
    """Asks all processes to save and leave (SIGTERM).

    Leaves a note until the next launch, or `watch` would start them again.
    """
    self._ssh(
      f'touch {_STOP}; kill -TERM -- "-$(cat {_PID})"'
      f" || {{ rm -f {_STOP}; exit 1; }}"
    )

  def delete(self) -> None:
    """Gives everything back, running or not."""
    self._gcloud("delete", self._name, "--force", "--quiet")
