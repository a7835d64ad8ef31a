"""Job descriptions: valid, and what they set is what a run reads."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import jsonschema
import yaml
from absl.testing import absltest, parameterized

from bertjax import hardware
from bertjax.hardware.machines import machine_of
from bertjax.parallel import launchers
from gcp import job as job_lib
from gcp import jobset, slurm
from gcp.job import Job
from tests.gcp.standins import SHELLCHECK, Commands

_ROOT = pathlib.Path(__file__).parents[2]
_SCHEMA = yaml.safe_load(
  pathlib.Path(__file__).with_name("jobset_schema.yaml").read_text("utf-8")
)


def _job(topology, **options):
  return Job(
    name="bert",
    machine=machine_of(hardware.parse(topology)),
    config="configs/bert.py:base",
    workdir="/shared/runs/b",
    **options,
  )


def _kubernetes(topology, **options):
  options = dict(image="registry/bert:1", claim="disk") | options
  return yaml.safe_load(jobset.render(_job(topology, **options)))


def _parts(manifest):
  """The job, its pod and its container."""
  (replicated,) = manifest["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  return replicated, job, pod, pod["containers"][0]


def _environment(container, coordinator, index):
  """What the kubelet makes of `env` for a pod."""
  fields = {
    "metadata.labels['jobset.sigs.k8s.io/coordinator']": coordinator,
    "metadata.annotations['batch.kubernetes.io/job-completion-index']": index,
  }
  found = {}
  for entry in container.get("env", ()):
    if "valueFrom" in entry:
      value = fields[entry["valueFrom"]["fieldRef"]["fieldPath"]]
    else:
      value = re.sub(r"\$\((\w+)\)", lambda m: found[m[1]], entry["value"])
    found[entry["name"]] = value
  return found


class JobSetTest(parameterized.TestCase):
  @parameterized.parameters(
    ("v5e:2x4", 1, 1, 8, "tpu-v5-lite-podslice", "2x4"),
    ("v5e:4x4", 1, 4, 4, "tpu-v5-lite-podslice", "4x4"),
    ("2xv6e:16x16", 2, 64, 4, "tpu-v6e-slice", "16x16"),
    ("v5p:2x4x4", 1, 8, 4, "tpu-v5p-slice", "2x4x4"),
    ("4xv4:2x2x2", 4, 2, 4, "tpu-v4-podslice", "2x2x2"),
  )
  def test_tpus(self, topology, slices, hosts, chips, accelerator, shape):
    manifest = _kubernetes(topology, spot=True)
    jsonschema.validate(manifest, _SCHEMA)
    replicated, job, pod, container = _parts(manifest)
    self.assertEqual(replicated["replicas"], slices)
    self.assertEqual((job["parallelism"], job["completions"]), (hosts, hosts))
    self.assertEqual(
      container["resources"]["limits"], {"google.com/tpu": chips}
    )
    total = hardware.parse(topology).num_devices
    self.assertEqual(slices * hosts * chips, total)
    self.assertEqual(
      pod["nodeSelector"],
      {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": shape,
        "cloud.google.com/gke-spot": "true",
      },
    )
    self.assertNotIn("env", container)  # GKE tells, and JAX reads it

  def test_pods_with_gpus_know_who_they_are(self):
    manifest = _kubernetes("h100:24")
    jsonschema.validate(manifest, _SCHEMA)
    replicated, job, pod, container = _parts(manifest)
    self.assertEqual(
      pod["nodeSelector"],
      {"cloud.google.com/gke-accelerator": "nvidia-h100-80gb"},
    )
    self.assertEqual(manifest["spec"]["coordinator"]["replicatedJob"],
                     replicated["name"])  # fmt: skip
    places = [
      launchers.detect(_environment(container, "bert-hosts-0-0.bert", str(i)))
      for i in range(job["completions"])
    ]
    self.assertEqual([p.process_id for p in places], [0, 1, 2])
    for found in places:
      self.assertEqual(found.num_processes, 3)
      self.assertIsNone(found.local_device_ids)  # all eight of its host
      host, port = found.coordinator_address.split(":")
      self.assertEqual(host, "bert-hosts-0-0.bert")
      self.assertIn({"containerPort": int(port)}, container["ports"])

  def test_one_host_needs_no_coordinator(self):
    *_, container = _parts(_kubernetes("h100:8"))
    self.assertIsNone(launchers.detect(_environment(container, "", "0")))

  def test_the_command_and_the_volume(self):
    manifest = _kubernetes(
      "v5e:4x4",
      claim=None,
      bucket="gs://b",
      service_account="me",
      arguments=("--config.seed=3",),
    )
    jsonschema.validate(manifest, _SCHEMA)
    _, job, pod, container = _parts(manifest)
    self.assertEqual(
      container["command"],
      ["python", "-m", "bertjax.train", "--config=configs/bert.py:base",
       "--workdir=/shared/runs/b", "--config.seed=3"],
    )  # fmt: skip
    self.assertEqual(
      pod["volumes"][0]["csi"]["volumeAttributes"]["bucketName"], "b"
    )
    self.assertEqual(
      job["template"]["metadata"]["annotations"],
      {"gke-gcsfuse/volumes": "true"},
    )

  def test_the_schema_knows_a_wrong_field(self):
    manifest = _kubernetes("v5e:4x4")
    _, job, *_ = _parts(manifest)
    job["paralelism"] = 3
    with self.assertRaises(jsonschema.ValidationError):
      jsonschema.validate(manifest, _SCHEMA)

  @parameterized.parameters(
    (dict(image=None), "--image is required"),
    (dict(claim=None), "either --claim or --bucket"),
    (dict(bucket="b"), "either --claim or --bucket"),
    (dict(mount="/data"), "/shared/runs/b is not in --mount=/data"),
  )
  def test_what_is_missing_is_named(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      _kubernetes("v5e:4x4", **options)


class SlurmTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.folder = pathlib.Path(self.create_tempdir())
    self.commands = Commands(self.folder / "standins")
    self.commands.add("scontrol", "echo gpu7; echo gpu8; echo gpu9")
    self.commands.add("scancel", f"touch {self.folder}/cancelled")
    self.out = self.folder / "places"
    self.python = self.folder / "python"
    self.python.write_text(
      f"#!{sys.executable}\n"
      "import os, sys\n"
      f"sys.path.insert(0, {str(_ROOT)!r})\n"
      "from bertjax.parallel import launchers\n"
      f"with open({str(self.out)!r}, 'a') as file:\n"
      "  print(launchers.detect(os.environ), sys.argv[1:], file=file)\n"
    )
    self.python.chmod(0o755)
    self.script = self.folder / "job.sh"
    job = _job("h100:24", python=str(self.python), time="1:00:00",
               max_restarts=3, arguments=("--config.x=a b",))  # fmt: skip
    self.script.write_text(slurm.render(job))

  def _run(self, srun, restarts=99):  # after limits and preemptions
    self.commands.add("srun", srun)
    return subprocess.Popen(
      ["bash", self.script],
      env=self.commands.environment(
        SLURM_SUBMIT_DIR=str(self.folder),
        SLURM_JOB_NODELIST="gpu[7-9]",
        SLURM_JOB_ID="5",
        SLURM_RESTART_COUNT=str(restarts),
      ),
      stderr=subprocess.DEVNULL,
    )

  def _requeued(self):
    return ["scontrol", "requeue", "5"] in self.commands.calls()

  def test_bash_and_shellcheck_find_nothing(self):
    subprocess.run(["bash", "-n", self.script], check=True)
    subprocess.run([SHELLCHECK, self.script], check=True)
    for line in self.script.read_text().splitlines():
      if line.startswith("#SBATCH"):
        self.assertRegex(line, r"^#SBATCH --[a-z-]+(=\S+)?$")

  def test_tasks_know_who_they_are(self):
    # As srun: options first, then the command, once for each task.
    process = self._run(
      "while [[ $1 == --* ]]; do shift; done\n"
      "for i in 0 1 2; do SLURM_PROCID=$i SLURM_STEP_NUM_TASKS=3"
      " SLURM_LOCALID=0 SLURM_STEP_TASKS_PER_NODE='1(x3)'"
      " SLURM_STEP_NODELIST='gpu[7-9]' \"$@\" || exit 1; done"
    )
    self.assertEqual(process.wait(), 0)
    self.assertFalse(self._requeued())
    lines = self.out.read_text().splitlines()
    arguments = ["-m", "bertjax.train", "--config=configs/bert.py:base",
                 "--workdir=/shared/runs/b", "--config.x=a b"]  # fmt: skip
    self.assertEqual(
      lines,
      [
        f"{launchers.Place('Slurm', f'gpu7:{launchers.PORT}', 3, i)}"
        f" {arguments}"
        for i in range(3)
      ],
    )

  @parameterized.parameters((0, False), (1, True), (143, False))
  def test_what_is_tried_again(self, status, again):
    process = self._run(f"exit {status}")
    self.assertEqual(process.wait(), status)
    self.assertEqual(self._requeued(), again)

  def test_failures_alone_use_up_the_restarts(self):
    found = []
    for status in (1, 143, 7, "limit", 1, 1):
      if status == "limit":
        self._run_to_the_limit()
      else:
        self.assertEqual(self._run(f"exit {status}").wait(), status)
      found.append(self._requeued())
      self.commands.forget()
    self.assertEqual(found, [True, False, True, True, True, False])
    lines = (self.folder / "bert-5.failures").read_text().splitlines()
    self.assertEqual([line[-1] for line in lines], list("1711"))

  def _run_to_the_limit(self):
    process = self._run(
      f"touch {self.folder}/started\n"
      f"while [ ! -e {self.folder}/cancelled ]; do sleep 0.05; done\nexit 143"
    )
    deadline = time.monotonic() + 30
    while not (self.folder / "started").exists():
      self.assertLess(time.monotonic(), deadline)
      time.sleep(0.05)
    process.send_signal(signal.SIGUSR1)
    self.assertEqual(process.wait(), 143)

  def test_at_the_time_limit_the_tasks_save_and_the_job_goes_on(self):
    self._run_to_the_limit()
    self.assertIn(["scancel", "--signal=TERM", "5"], self.commands.calls())
    self.assertTrue(self._requeued())

  def test_tpus_are_refused(self):
    with self.assertRaisesRegex(ValueError, "not v5litepod-16; .*jobset"):
      slurm.render(_job("v5e:4x4"))


class CommandTest(absltest.TestCase):
  def _run(self, *arguments):
    return subprocess.run(
      [sys.executable, "-m", "gcp.jobs", *arguments],
      cwd=_ROOT,
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      check=False,
    )

  def test_the_readme_command_writes_a_file(self):
    out = pathlib.Path(self.create_tempdir()) / "job.yaml"
    done = self._run(
      "--kind=jobset", "--topology=v5e:4x4", "--name=bert",
      "--config=configs/bert.py:base", "--workdir=/shared/runs/bert",
      "--image=i", "--claim=c", f"--output={out}", "--", "--config.seed=2",
    )  # fmt: skip
    self.assertEqual(done.returncode, 0, done.stderr)
    manifest = yaml.safe_load(out.read_text())
    jsonschema.validate(manifest, _SCHEMA)
    *_, container = _parts(manifest)
    self.assertEqual(container["command"][-1], "--config.seed=2")

  def test_a_flag_of_the_other_kind_is_refused(self):
    done = self._run(
      "--kind=slurm", "--topology=h100:8", "--name=bert", "--config=c",
      "--workdir=w", "--image=i",
    )  # fmt: skip
    self.assertEqual(done.returncode, 1)
    self.assertIn("Error: --image is for --kind=jobset", done.stderr)

  def test_a_config_that_the_checkout_lacks_is_refused(self):
    done = self._run(
      "--kind=slurm", "--topology=h100:8", "--name=bert",
      "--config=configs/nosuch.py:base", "--workdir=w",
    )  # fmt: skip
    self.assertEqual(done.returncode, 1)
    self.assertIn(
      "Error: --config=configs/nosuch.py:base: there is no file", done.stderr
    )
    job_lib.check_config("/on/the/cluster.py:base")

  def test_names_and_numbers_out_of_range(self):
    for options, message in (
      (dict(name="Bert"), "name='Bert' must be"),
      (dict(grace_s=-1), "grace_s=-1"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        Job(**dict(
          name="b", machine=machine_of(hardware.parse("h100:8")),
          config="c", workdir="w") | options)  # fmt: skip


if __name__ == "__main__":
  absltest.main()
