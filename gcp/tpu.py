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
`--dry-run` prints the gcloud commands instead. `2xv5e:16x16` are two slices
(Multislice): one queued resource of two nodes.
"""

import functools
import sys
import time
from collections.abc import Callable, Sequence

from absl import app, flags

from bertjax import cli, hardware
from bertjax.hardware.machines import machine_of
from gcp.job import check_config
from gcp.queued_resource import (
  MOUNT,
  RUNNING,
  STOPPED,
  GcloudError,
  State,
  Tpu,
  check_packed,
  packed,
)

_MOST_FAILURES = 10  # of gcloud, in a row


def watch(
  tpu: Tpu,
  arguments: Sequence[str],
  *,
  create: dict[str, object],
  bucket: str | None,
  max_restarts: int,
  poll_s: float,
) -> bool:
  """Waits, sets up, launches, and starts over until the run is done.

  Args:
    tpu: may be absent, waiting, active or preempted.
    arguments: of `bertjax.train`.
    create: arguments of `Tpu.create`.
    bucket: as in `Tpu.setup`.
    max_restarts: after so many restarts, of machines or of the run, it is left
      as it is.
    poll_s: seconds between two looks.

  Returns:
    Whether the run is done; False: somebody has stopped it meanwhile. One that
    was stopped before is launched again.

  Raises:
    GcloudError: a command failed before anything had worked, or again and
      again.
    ValueError: there is no commit to copy to the hosts.
    RuntimeError: the run failed too often.
  """
  restarts, failures, ready, worked, begun = 0, 0, False, False, False

  def restart(why: str, act: Callable[[], None]) -> None:
    nonlocal restarts
    if restarts == max_restarts:
      raise RuntimeError(f"{why}; --max_restarts={max_restarts} were made.")
    act()  # it may fail and be tried again, which is still one restart
    restarts += 1
    print(f"{why}; restart {restarts} of {max_restarts}.", flush=True)

  while True:
    try:
      state = tpu.state()
      if state is State.ABSENT:
        ready = False
        packed()  # refuses before anything is rented
        tpu.create(**create)
      worked = True
      if state is State.GONE:
        restart("The TPUs were taken away", tpu.delete)
        continue
      if state is State.ACTIVE:
        found = set(tpu.statuses())
        if found == {"0"}:
          return True
        if STOPPED in found and RUNNING not in found and begun:
          return False
        if found == {"none"} and not ready:
          tpu.setup(bucket)
          ready = True
        launch = functools.partial(tpu.launch, arguments)
        if found == {"none"} or (STOPPED in found and RUNNING not in found):
          launch()
        elif RUNNING not in found:
          status = ", ".join(sorted(found))
          restart(f"The run ended with status {status}", launch)
        begun = True
      failures = 0
    except GcloudError as err:  # so it is while TPUs are taken away
      failures += 1
      if not worked or failures > _MOST_FAILURES:
        raise
      print(err, file=sys.stderr, flush=True)
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
  check_config(config)
  check_packed(config.partition(":")[0])
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
    done = watch(
      tpu,
      arguments,
      create=create,
      bucket=given.bucket,
      max_restarts=given.max_restarts,
      poll_s=given.poll_s,
    )
    end = "is done" if done else "was stopped; watch again to go on"
    print(f"The run {end}. The TPUs are still there: gcp.tpu delete.")
  elif rest:
    raise ValueError(f"{command} takes no further arguments: {rest}.")
  elif command == "create":
    tpu.create(**create)
  elif command == "setup":
    tpu.setup(given.bucket)
  elif command == "status":
    state = tpu.state()
    print(state, flush=True)
    if state is State.ACTIVE:  # before that there are no hosts to ask
      print(*tpu.statuses())
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
  flags.DEFINE_string("bucket", None, f"Cloud Storage, mounted as {MOUNT}.")
  flags.DEFINE_string("config", None, "Of bertjax.train, as configs/bert.py.")
  flags.DEFINE_string("workdir", None, "In a folder that all hosts share.")
  flags.DEFINE_integer("max_restarts", 20, "Of machines or of the run.")
  flags.DEFINE_float("poll_s", 60.0, "Seconds between two looks.")
  flags.DEFINE_integer("lines", 50, "Of the log.")
  flags.DEFINE_bool("dry_run", False, "Print the commands; run none.")
  flags.DEFINE_alias("dry-run", "dry_run")


if __name__ == "__main__":
  _define_flags()
  app.run(main)
