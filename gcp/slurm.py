"""A job as a Slurm batch script, for clusters of GPUs.

One task for each node, with all GPUs of it. srun tells the tasks who they are
(SLURM_PROCID, SLURM_STEP_NUM_TASKS), the script where process 0 is; both are
read by `bertjax.parallel.launchers`.
"""

import shlex

from bertjax.parallel.launchers import PORT
from gcp.job import Job

_BODY = """
set -euo pipefail
cd "${{SLURM_SUBMIT_DIR:?}}"

nodes=$(scontrol show hostnames "${{SLURM_JOB_NODELIST:?}}")
export JAX_COORDINATOR_ADDRESS="${{nodes%%$'\\n'*}}:{port}"

# Slurm warns this script of the limit, and this script the tasks.
limit=0
trap 'limit=1; scancel --signal=TERM "${{SLURM_JOB_ID:?}}"' USR1

srun --kill-on-bad-exit=1 {command} &
status=0
while wait "$!" && status=0 || status=$?; kill -0 "$!" 2> /dev/null; do :; done

# A run that was cancelled (143) stays so; one that failed is tried again. Slurm
# counts restarts after limits and preemptions, too.
again=$limit
if (( status && !limit && status != 143 )); then
  failures="{name}-${{SLURM_JOB_ID:?}}.failures"
  echo "$(date): status $status" >> "$failures"
  (( $(wc -l < "$failures") > {restarts} )) || again=1
fi
if (( status && again )); then
  echo "Status $status: requeued." >&2
  scontrol requeue "${{SLURM_JOB_ID:?}}"
fi
exit "$status"
"""


def render(job: Job) -> str:
  """The script.

  Raises:
    ValueError: the topology is of TPUs.
  """
  machine = job.machine
  if machine.on_tpu:
    raise ValueError(
      f"kind=slurm is for GPUs, not {machine.accelerator_type}; see"
      " --kind=jobset or gcp.tpu."
    )
  options = {
    "job-name": job.name,
    "nodes": machine.num_hosts,
    "ntasks-per-node": 1,
    "gpus-per-node": machine.chips_per_host,
    "exclusive": "",
    "partition": job.partition,
    "account": job.account,
    "time": job.time,
    "signal": f"B:USR1@{job.grace_s}",  # to this script, before the limit
    "requeue": "",
    "open-mode": "append",
    "output": "%x-%j.log",
  }
  lines = ["#!/bin/bash"]
  for name, value in options.items():
    if value is not None:
      lines.append(f"#SBATCH --{name}" + (f"={value}" if value != "" else ""))
  command = shlex.join([job.python, "-m", *job.train_arguments])
  body = _BODY.format(
    port=PORT, command=command, name=job.name, restarts=job.max_restarts
  )
  return "\n".join(lines) + "\n" + body
