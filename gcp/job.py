"""A run of `bertjax.train` on a cluster, whatever the cluster's language."""

import dataclasses
import pathlib
import re

from bertjax.hardware.machines import Machine


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """A run of `bertjax.train` on a cluster.

  Attributes:
    name: of the job, a DNS label.
    machine: hosts and chips; one process a host.
    config: of `bertjax.train`.
    workdir: in a folder that all hosts share.
    arguments: further ones of `bertjax.train`.
    max_restarts: after failures; a time limit or preemption under Slurm does
      not count.
    grace_s: seconds between the signal and the end, to save in.
    image: jobset: what the containers run.
    claim: jobset: persistent volume claim that is mounted at `mount`.
    bucket: jobset: of Cloud Storage, mounted there instead.
    mount: jobset: where.
    service_account: jobset: of the pods.
    spot: jobset: on GKE's spot nodes.
    partition: slurm.
    account: slurm.
    time: slurm: limit, as D-HH:MM:SS.
    python: slurm: the interpreter, seen from the folder of submission.
  """

  name: str
  machine: Machine
  config: str
  workdir: str
  arguments: tuple[str, ...] = ()
  max_restarts: int = 20
  grace_s: int = 120
  image: str | None = None
  claim: str | None = None
  bucket: str | None = None
  mount: str = "/shared"
  service_account: str | None = None
  spot: bool = False
  partition: str | None = None
  account: str | None = None
  time: str | None = None
  python: str = ".venv/bin/python"

  def __post_init__(self):
    # Pods add their indices to it, and 63 characters are a host name's.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", self.name):
      raise ValueError(
        f"name={self.name!r} must be up to 40 of a-z, 0-9 and -, from a letter"
        " to a letter or digit."
      )
    for field in ("max_restarts", "grace_s"):
      if (value := getattr(self, field)) < 0:
        raise ValueError(f"{field}={value} must not be negative.")

  @property
  def train_arguments(self) -> list[str]:
    """What `python -m` gets."""
    return [
      "bertjax.train",
      f"--config={self.config}",
      f"--workdir={self.workdir}",
      *self.arguments,
    ]


def check_config(config: str) -> None:
  """Refuses a file that the checkout lacks; others are for the hosts to find.

  Raises:
    ValueError: names both.
  """
  checkout = pathlib.Path(__file__).parents[1]
  path = pathlib.Path(config.partition(":")[0])
  if not path.is_absolute() and not (checkout / path).is_file():
    raise ValueError(
      f"--config={config}: there is no file {path} in {checkout}, from a copy"
      " of which the job runs."
    )
