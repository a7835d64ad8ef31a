"""Replicas that differ are found, whatever the parameters' sharding."""

import jax
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import NamedSharding, PartitionSpec

from bertjax.evals.replicas import ReplicaError, differing, replicas
from bertjax.parallel.mesh import make_mesh


class ReplicasTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.mesh = make_mesh(data=2, model=2, devices=jax.devices()[:4])

  def _array(self, spec, spoilt=()):
    """3 x 4 numbers; those of some devices are off by a bit."""
    value = np.arange(12, dtype=np.float32).reshape(3, 4)
    sharding = NamedSharding(self.mesh, spec)
    parts = []
    for device, index in sharding.devices_indices_map(value.shape).items():
      part = np.array(value[index])
      if device.id in spoilt:
        part[0, 0] = np.nextafter(part[0, 0], np.float32(99))
      parts.append(jax.device_put(part, device))
    return jax.make_array_from_single_device_arrays(
      value.shape, sharding, parts
    )

  @parameterized.parameters(
    # Devices 0, 1 / 2, 3 are the two workers; 0 and 2 hold the same shard.
    (PartitionSpec(), (3,), 1),
    (PartitionSpec(None, "model"), (1,), 1),
    (PartitionSpec(None, "model"), (2, 3), 2),
    (PartitionSpec(None, "model"), (0, 2), 0),
    (PartitionSpec(None, ("data", "model")), (1,), 0),
  )
  def test_numbers_are_counted_once(self, spec, spoilt, expected):
    tree = {
      "whole": self._array(PartitionSpec()),
      "w": self._array(spec, spoilt),
    }
    self.assertEqual(differing(tree, self.mesh), {"whole": 0, "w": expected})

  def test_a_run_ends_and_names_the_parameter(self):
    evaluate = replicas(mesh=self.mesh)
    good, bad = (self._array(PartitionSpec(), spoilt) for spoilt in ((), (2,)))
    key = jax.random.key(0)
    self.assertEqual(evaluate({"params": {"w": good}}, key), {"differing": 0.0})
    with self.assertRaisesRegex(ReplicaError, r"differ.*: layer/w \(1 numbers"):
      evaluate({"params": {"layer": {"w": bad}, "v": good}}, key)


if __name__ == "__main__":
  absltest.main()
