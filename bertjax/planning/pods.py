"""How large a slice of TPUs there is: beyond it compilers abort, or dream."""

import math

from bertjax.hardware import Topology

# Shape of the whole pod, which slices are cut from (cloud.google.com/tpu/docs).
_PODS = {
  "v4": (16, 16, 16),
  "v5e": (16, 16),
  "v5p": (16, 20, 28),
  "v6e": (16, 16),
}


def check(topology: Topology) -> None:
  """Refuses slices that no pod holds.

  Raises:
    ValueError: a slice is larger than a pod.
  """
  name = topology.chip.name
  pod = _PODS.get(name)
  if pod is None:  # GPUs
    return
  fits = all(a <= b for a, b in zip(sorted(topology.shape), sorted(pod)))
  if not fits:
    raise ValueError(
      f"topology={topology.name!r}: a pod of {name} has"
      f" {'x'.join(map(str, pod))} = {math.prod(pod):,} chips; join several"
      f" slices, as 4x{name}:{'x'.join(map(str, pod))}."
    )
