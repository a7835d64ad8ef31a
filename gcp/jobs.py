r"""Job descriptions for clusters: a Kubernetes JobSet, or a Slurm script.

  python -m gcp.jobs --kind=jobset --topology=2xv5e:16x16 --name=lamb \
      --config=configs/lamb.py:large --workdir=/shared/runs/lamb \
      --image=IMAGE --claim=CLAIM --output=lamb.yaml     # kubectl apply -f it
  python -m gcp.jobs --kind=slurm --topology=h100:32 --name=bert \
      --config=configs/bert.py:base --workdir=/shared/runs/bert \
      --partition=gpu --time=24:00:00 --output=bert.sh   # sbatch it

Further arguments go to `bertjax.train`: `-- --config.optim.learning_rate=4e-4`.
What the topology needs comes from `bertjax.hardware.machines`.
"""

import dataclasses
import pathlib
import sys

from absl import app, flags

from bertjax import cli, hardware
from bertjax.hardware.machines import machine_of
from bertjax.registry import lookup
from gcp import jobset, slurm
from gcp.job import Job, check_config

KINDS = {"jobset": jobset.render, "slurm": slurm.render}


_FLAGS_OF = {
  "--kind=jobset": (
    "image",
    "claim",
    "bucket",
    "mount",
    "service_account",
    "spot",
  ),
  "--kind=slurm": ("partition", "account", "time", "python"),
}


def main(argv: list[str]) -> None:
  given = flags.FLAGS
  with cli.clear_errors():
    for name in ("kind", "topology", "name", "config", "workdir"):
      if getattr(given, name) is None:
        raise ValueError(f"--{name} is required.")
    render = lookup(KINDS, given.kind, "kind")
    cli.refuse_others(f"--kind={given.kind}", _FLAGS_OF, given)
    check_config(given.config)
    cli.check_output("output", given.output)
    fields = {
      f.name: given[f.name].value
      for f in dataclasses.fields(Job)
      if f.name in given and f.name != "name"
    }
    job = Job(
      name=given.name,
      machine=machine_of(hardware.parse(given.topology)),
      arguments=tuple(argv[1:]),
      **fields,
    )
    text = render(job)
  if given.output is None:
    sys.stdout.write(text)
  else:
    pathlib.Path(given.output).write_text(text, "utf-8")


def _define_flags() -> None:
  flags.DEFINE_enum("kind", None, sorted(KINDS), "What to write.")
  flags.DEFINE_string("topology", None, "As v5e:4x4, 2xv5e:16x16 or h100:16.")
  flags.DEFINE_string("name", None, "Of the job.")
  flags.DEFINE_string("config", None, "Of bertjax.train.")
  flags.DEFINE_string("workdir", None, "In a folder that all hosts share.")
  flags.DEFINE(cli.PATH, "output", None, "File to write; by default it prints.")
  flags.DEFINE_integer("max_restarts", 20, "After failures.")
  flags.DEFINE_integer("grace_s", 120, "Seconds to save in after a signal.")
  flags.DEFINE_string("image", None, "Container image.")
  flags.DEFINE_string("claim", None, "Persistent volume claim to mount.")
  flags.DEFINE_string("bucket", None, "Cloud Storage bucket to mount.")
  flags.DEFINE_string("mount", "/shared", "Path of claim or bucket in a pod.")
  flags.DEFINE_string("service_account", None, "Of the pods.")
  flags.DEFINE_bool("spot", False, "On GKE's spot nodes.")
  flags.DEFINE_string("partition", None, "Slurm's queue for the job.")
  flags.DEFINE_string("account", None, "Slurm's account to charge.")
  flags.DEFINE_string("time", None, "Limit, as 24:00:00.")
  flags.DEFINE_string("python", ".venv/bin/python", "The interpreter.")


if __name__ == "__main__":
  _define_flags()
  app.run(main)
