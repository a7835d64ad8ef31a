"""Over which links the collectives of a plan run, and how long they take."""

from collections.abc import Iterable, Mapping

from bertjax.hardware import Collective, Topology
from bertjax.parallel.mesh import sliced_axis

SLICE = "slice"


def axes(
  collective: Collective, topology: Topology, mesh: Mapping[str, int]
) -> tuple[str, ...]:
  """Axes of the mesh along which a collective runs; between slices: `SLICE`.

  Args:
    collective: of a step.
    topology: that the mesh covers.
    mesh: size of each axis, in order.
  """
  if collective.slices > 1:
    return (SLICE,)
  inside = dict(mesh)
  if topology.slices > 1:
    inside[sliced_axis(mesh, topology.slices)] //= topology.slices
  return collective.axes(inside)


def seconds(
  topology: Topology, collectives: Iterable[Collective]
) -> float | None:
  """What the exchanges of a step take, one after the other, on rings.

  Inside a slice a ring has two links of a chip to itself, one each way; what
  crosses slices shares the network that a chip has. Neither waits for anything
  else.

  Args:
    topology: of the devices.
    collectives: of a step.

  Returns:
    None if something crosses slices of chips whose network is not published.
  """
  chip = topology.chip
  inside = across = 0.0
  for collective in collectives:
    if collective.slices > 1:
      across += collective.sent_bytes
    else:
      inside += _on_rings(collective, topology)
  if across and not chip.network_bandwidth:
    return None
  between = across / chip.network_bandwidth if across else 0
  return inside / chip.ring_bandwidth + between


def _on_rings(collective: Collective, topology: Topology) -> float:
  """Bytes that pass the two links of a chip, others' on their way included.

  The switch between GPUs takes every byte once.
  """
  if topology.chip.platform != "tpu":
    return collective.sent_bytes
  if collective.kind == "collective-permute":
    return 2 * collective.sent_bytes  # one way, so over one link of the two
  if collective.kind == "all-to-all":
    # On average a byte goes a quarter of the way around. In a group of several
    # dimensions of the torus the longest one has the most to carry.
    around = min(collective.group_size, max(topology.shape))
    return collective.times * collective.operand_bytes * around / 4
  return collective.sent_bytes
