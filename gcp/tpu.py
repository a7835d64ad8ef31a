r"""TPU VMs by gcloud, from the request to the end of a run.

  export WHICH="--name=bert --topology=v5e:4x4 --zone=us-west4-a"
  python -m gcp.tpu create $WHICH --spot
  python -m gcp.tpu setup  $WHICH --bucket=BUCKET
  python -m gcp.tpu launch $WHICH --config=configs/bert.py:base \
      --workdir=/mnt/shared/runs/bert
  python -m gcp.tpu status $WHICH       also: logs, stop, delete
  python -m gcp.tpu watch  $WHICH ...   all of that in turn, and again after a
                                        preemption, until the run is done

Further arguments of `launch` and `watch`, after `--`, go to `bertjax.train`.
`--dry_run` prints the gcloud commands instead. `2xv5e:16x16` are two slices
(Multislice): one queued resource of two nodes.
"""

import enum
import pathlib
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence

from absl import app, flags

from bertjax import cli, hardware
from bertjax.hardware.machines import Machine, machine_of

_ROOT = pathlib.Path(__file__).parents[1]
_HOME = "bertjax"  # the checkout, in the home folder of each host
_LOG, _STATUS, _PID = (f"{_HOME}-run.{end}" for end in ("log", "status", "pid"))
_MOUNT = "/mnt/shared"
_RUNNING = "running"
_MOST_UNREACHABLE = 10  # looks in a row at hosts that do not answer


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
    done = subprocess.run(
      command,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE if quiet else None,
      text=True,
      check=False,
    )
    if done.returncode:
      raise GcloudError(
        f"{shlex.join(command[:6])} ended with status {done.returncode}."
        f" {(done.stderr or '').strip()}".strip()
      )
    return done.stdout

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
    """
    script = (_ROOT / "gcp" / "setup_host.sh").read_text("utf-8")
    with tempfile.TemporaryDirectory() as folder:
      archive = pathlib.Path(folder) / f"{_HOME}.tar.gz"
      packing = ["git", "archive", "--format=tar.gz", f"--output={archive}",
                 "HEAD"]  # fmt: skip
      if self._dry_run:
        print(shlex.join(packing))
      else:
        subprocess.run(packing, cwd=_ROOT, check=True)
      self._gcloud(
        "scp", str(archive), f"{self._name}:", "--node=all", "--worker=all"
      )
    arguments = shlex.join([_HOME, _MOUNT, bucket or ""])
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
      f"cd {_HOME} && echo {_RUNNING} > ../{_STATUS}"
      f" && (setsid nohup bash -c {shlex.quote(run)} >> ../{_LOG} 2>&1"
      f" < /dev/null & echo $! > ../{_PID})"
    )

  def statuses(self) -> list[str]:
    """Of the hosts' runs: "running", an exit status, or "none"."""
    # A host that was started anew holds what its predecessor said.
    said = self._ssh(
      f"s=$(cat {_STATUS} 2>/dev/null || echo none);"
      f' if [ "$s" = {_RUNNING} ] && ! kill -0 -- "-$(cat {_PID})" 2>/dev/null;'
      # It may have ended just now, and noted it.
      f' then s=$(cat {_STATUS}); [ "$s" != {_RUNNING} ] || s=lost; fi;'
      " echo status=$s"
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
    """Asks all processes to save and leave (SIGTERM)."""
    self._ssh(f'kill -TERM -- "-$(cat {_PID})"')

  def delete(self) -> None:
    """Gives everything back, running or not."""
    self._gcloud("delete", self._name, "--force", "--quiet")


def watch(
  tpu: Tpu,
  arguments: Sequence[str],
  *,
  create: dict[str, object],
  bucket: str | None,
  max_restarts: int,
  poll_s: float,
) -> None:
  """Waits, sets up, launches, and starts over until the run is done.

  Args:
    tpu: may be absent, waiting, active or preempted.
    arguments: of `bertjax.train`.
    create: arguments of `Tpu.create`.
    bucket: as in `Tpu.setup`.
    max_restarts: after so many restarts, of machines or of the run, it is left
      as it is.
    poll_s: seconds between two looks.

  Raises:
    GcloudError: a command failed.
    RuntimeError: the run failed too often.
  """
  restarts, unreachable, ready = 0, 0, False

  def restart(why: str) -> None:
    nonlocal restarts
    if restarts == max_restarts:
      raise RuntimeError(f"{why}; --max_restarts={max_restarts} were made.")
    restarts += 1
    print(f"{why}; restart {restarts} of {max_restarts}.", flush=True)

  while True:
    state = tpu.state()
    if state is State.ABSENT:
      ready = False
      tpu.create(**create)
    elif state is State.GONE:
      restart("The TPUs were taken away")
      tpu.delete()
      continue
    elif state is State.ACTIVE:
      try:
        found = set(tpu.statuses())
      except GcloudError as err:  # so it is while TPUs are taken away
        unreachable += 1
        if unreachable > _MOST_UNREACHABLE:
          raise
        print(err, file=sys.stderr, flush=True)
        time.sleep(poll_s)
        continue
      unreachable = 0
      if found == {"0"}:
        return
      if found == {"none"}:
        if not ready:
          tpu.setup(bucket)
          ready = True
        tpu.launch(arguments)
      elif not found & {_RUNNING}:
        restart(f"The run ended with status {', '.join(sorted(found))}")
        tpu.launch(arguments)
    time.sleep(poll_s)


def _preview(tpu: Tpu, arguments: Sequence[str], create, bucket) -> None:
  """What `watch` would run in a life without preemptions."""
  tpu.state()
  tpu.create(**create)
  tpu.setup(bucket)
  tpu.launch(arguments)
  tpu.statuses()


def _arguments(config: str | None, workdir: str | None, rest) -> list[str]:
  if config is None or workdir is None:
    raise ValueError("--config and --workdir say what to run; both are needed.")
  return [f"--config={config}", f"--workdir={workdir}", *rest]


def main(argv: list[str]) -> None:
  given = flags.FLAGS
  command, rest = (argv[1] if argv[1:] else ""), argv[2:]
  with cli.clear_errors():
    for name in ("name", "topology", "zone"):
      if getattr(given, name) is None:
        raise ValueError(f"--{name} is required.")
    machine = machine_of(hardware.parse(given.topology))
    tpu = Tpu(
      given.name,
      machine,
      zone=given.zone,
      project=given.project,
      dry_run=given.dry_run,
    )
    try:
      _run(tpu, command, rest, given)
    except (GcloudError, RuntimeError) as err:
      print(f"Error: {err}", file=sys.stderr)
      sys.exit(1)


def _run(tpu: Tpu, command: str, rest: list[str], given) -> None:
  create = dict(
    spot=given.spot,
    reserved=given.reserved,
    service_account=given.service_account,
    network=given.network,
  )
  if command == "launch":
    tpu.launch(_arguments(given.config, given.workdir, rest))
  elif command == "watch":
    arguments = _arguments(given.config, given.workdir, rest)
    if given.dry_run:
      _preview(tpu, arguments, create, given.bucket)
      return
    watch(
      tpu,
      arguments,
      create=create,
      bucket=given.bucket,
      max_restarts=given.max_restarts,
      poll_s=given.poll_s,
    )
    print("The run is done. The TPUs are still there: gcp.tpu delete.")
  elif rest:
    raise ValueError(f"{command} takes no further arguments: {rest}.")
  elif command == "create":
    tpu.create(**create)
  elif command == "setup":
    tpu.setup(given.bucket)
  elif command == "status":
    print(tpu.state(), *tpu.statuses())
  elif command == "logs":
    tpu.logs(given.lines)
  elif command == "stop":
    tpu.stop()
  elif command == "delete":
    tpu.delete()
  else:
    raise ValueError(
      f"command={command!r} is unknown; choose from create, setup, launch,"
      " watch, status, logs, stop, delete."
    )


def _define_flags() -> None:
  flags.DEFINE_string("name", None, "Of the queued resource and its nodes.")
  flags.DEFINE_string("topology", None, "What to rent, as v5e:4x4.")
  flags.DEFINE_string("zone", None, "Of Compute Engine, as us-west4-a.")
  flags.DEFINE_string("project", None, "Google Cloud project.")
  flags.DEFINE_bool("spot", False, "Cheaper, and may be taken away any time.")
  flags.DEFINE_bool("reserved", False, "From a reservation.")
  flags.DEFINE_string("service_account", None, "Of the hosts.")
  flags.DEFINE_string("network", None, "Of the hosts.")
  flags.DEFINE_string("bucket", None, f"Cloud Storage, mounted as {_MOUNT}.")
  flags.DEFINE_string("config", None, "Of bertjax.train, as configs/bert.py.")
  flags.DEFINE_string("workdir", None, "In a folder that all hosts share.")
  flags.DEFINE_integer("max_restarts", 20, "Of machines or of the run.")
  flags.DEFINE_float("poll_s", 60.0, "Seconds between two looks.")
  flags.DEFINE_integer("lines", 50, "Of the log.")
  flags.DEFINE_bool("dry_run", False, "Print the commands; run none.")


if __name__ == "__main__":
  _define_flags()
  app.run(main)
