"""A job as a Kubernetes JobSet, for GKE with TPUs or GPUs.

One child job for each slice, one pod for each host. Of TPUs GKE tells the pods
who they are (TPU_WORKER_ID, TPU_WORKER_HOSTNAMES, and MEGASCALE_* of several
slices), which JAX reads; of GPUs the manifest does, with the variables of
`bertjax.parallel.launchers`.
"""

import pathlib
from typing import Any

from bertjax.parallel.launchers import PORT
from gcp.job import Job

_JOB = "hosts"  # of the replicated job
_COORDINATOR = "metadata.labels['jobset.sigs.k8s.io/coordinator']"
_INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def render(job: Job) -> str:
  """The manifest, as YAML.

  Raises:
    ValueError: no image, or no volume that holds the workdir.
  """
  import yaml

  return yaml.safe_dump(manifest(job), sort_keys=False, width=80)


def manifest(job: Job) -> dict[str, Any]:
  """The manifest, as plain values; raises like `render`."""
  if job.image is None:
    raise ValueError("--image is required: what the containers run.")
  machine = job.machine
  metadata: dict[str, Any] = {"name": job.name}
  if machine.on_tpu and machine.num_hosts > 1:
    # A slice is a node pool of its own, and its job has it alone.
    metadata["annotations"] = {
      "alpha.jobset.sigs.k8s.io/exclusive-topology": (
        "cloud.google.com/gke-nodepool"
      )
    }
  return {
    "apiVersion": "jobset.x-k8s.io/v1alpha2",
    "kind": "JobSet",
    "metadata": metadata,
    "spec": {
      "failurePolicy": {"maxRestarts": job.max_restarts},
      "network": {
        "enableDNSHostnames": True,
        "publishNotReadyAddresses": True,
      },
      "coordinator": {"replicatedJob": _JOB, "jobIndex": 0, "podIndex": 0},
      "replicatedJobs": [
        {
          "name": _JOB,
          "replicas": machine.slices,
          "template": {
            "spec": {
              "completionMode": "Indexed",
              "parallelism": machine.hosts,
              "completions": machine.hosts,
              "backoffLimit": 0,  # one pod fails: all start again, together
              "template": _pod(job),
            }
          },
        }
      ],
    },
  }


def _pod(job: Job) -> dict[str, Any]:
  volume, annotations = _volume(job)
  spec: dict[str, Any] = {
    "restartPolicy": "Never",
    "hostNetwork": True,
    "dnsPolicy": "ClusterFirstWithHostNet",
    "terminationGracePeriodSeconds": job.grace_s,
    "nodeSelector": _nodes(job),
    "containers": [_container(job)],
    "volumes": [volume],
  }
  if not job.machine.on_tpu:
    spec["tolerations"] = [{"key": "nvidia.com/gpu", "operator": "Exists"}]
  if job.service_account is not None:
    spec["serviceAccountName"] = job.service_account
  pod: dict[str, Any] = {"spec": spec}
  if annotations:
    pod = {"metadata": {"annotations": annotations}, **pod}
  return pod


def _nodes(job: Job) -> dict[str, str]:
  label, machine = "cloud.google.com/gke", job.machine
  if machine.on_tpu:
    nodes = {
      f"{label}-tpu-accelerator": machine.gke_accelerator,
      f"{label}-tpu-topology": machine.shape,
    }
  else:
    nodes = {f"{label}-accelerator": machine.gke_accelerator}
  if job.spot:
    nodes[f"{label}-spot"] = "true"
  return nodes


def _container(job: Job) -> dict[str, Any]:
  machine = job.machine
  resource = "google.com/tpu" if machine.on_tpu else "nvidia.com/gpu"
  count = machine.chips_per_host
  container: dict[str, Any] = {
    "name": "train",
    "image": job.image,
    "command": ["python", "-m", *job.train_arguments],
    "resources": {"limits": {resource: count}, "requests": {resource: count}},
    "volumeMounts": [{"name": "shared", "mountPath": job.mount}],
  }
  if not machine.on_tpu and machine.num_hosts > 1:
    container["ports"] = [{"containerPort": PORT}]
    container["env"] = [
      _from_pod("COORDINATOR", _COORDINATOR),
      {
        "name": "JAX_COORDINATOR_ADDRESS",
        "value": f"$(COORDINATOR):{PORT}",
      },
      {"name": "JAX_NUM_PROCESSES", "value": str(machine.num_hosts)},
      _from_pod("JAX_PROCESS_ID", _INDEX),
    ]
  elif machine.on_tpu:
    # What TPU VMs of a slice, and JAX's coordinator, talk through.
    container["ports"] = [{"containerPort": 8471}, {"containerPort": 8482}]
  return container


def _from_pod(name: str, path: str) -> dict[str, Any]:
  return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _volume(job: Job) -> tuple[dict[str, Any], dict[str, str]]:
  """The volume of the workdir, and annotations that its driver wants."""
  if (job.claim is None) == (job.bucket is None):
    raise ValueError(
      "Name the volume that holds the workdir: either --claim or --bucket."
    )
  mount = pathlib.PurePosixPath(job.mount)
  if not pathlib.PurePosixPath(job.workdir).is_relative_to(mount):
    raise ValueError(
      f"--workdir={job.workdir} is not in --mount={mount}, which pods share."
    )
  if job.claim is not None:
    claim = {"claimName": job.claim}
    return {"name": "shared", "persistentVolumeClaim": claim}, {}
  csi = {
    "driver": "gcsfuse.csi.storage.gke.io",
    "volumeAttributes": {
      "bucketName": job.bucket.removeprefix("gs://"),
      # Checkpoints and vocabularies are renamed as folders.
      "mountOptions": "implicit-dirs,rename-dir-limit=10000",
    },
  }
  return {"name": "shared", "csi": csi}, {"gke-gcsfuse/volumes": "true"}
