"""Hosts and names of what is rented."""

from absl.testing import absltest, parameterized

from bertjax import hardware
from bertjax.hardware import machines


class MachineTest(parameterized.TestCase):
  # cloud.google.com/tpu/docs, the tables of configurations of each version.
  @parameterized.parameters(
    ("v5e:1x1", 1, 1, "v5litepod-1", "ct5lp-hightpu-1t"),
    ("v5e:2x2", 1, 4, "v5litepod-4", "ct5lp-hightpu-4t"),
    ("v5e:2x4", 1, 8, "v5litepod-8", "ct5lp-hightpu-8t"),
    ("v5e:4x4", 4, 4, "v5litepod-16", "ct5lp-hightpu-4t"),
    ("v5e:16x16", 64, 4, "v5litepod-256", "ct5lp-hightpu-4t"),
    ("v6e:4x8", 8, 4, "v6e-32", "ct6e-standard-4t"),
    ("v5p:2x2x1", 1, 4, "v5p-8", "ct5p-hightpu-4t"),
    ("v5p:4x4x4", 16, 4, "v5p-128", "ct5p-hightpu-4t"),
    ("v4:2x2x4", 4, 4, "v4-32", "ct4p-hightpu-4t"),
    ("h100:16", 2, 8, "", "a3-highgpu-8g"),
  )
  def test_of_one_slice(self, name, hosts, chips, accelerator_type, machine):
    found = machines.machine_of(hardware.parse(name))
    self.assertEqual(
      (found.hosts, found.chips_per_host, found.accelerator_type),
      (hosts, chips, accelerator_type),
    )
    self.assertEqual(found.machine_type, machine)
    self.assertEqual(found.on_tpu, not name.startswith("h100"))

  def test_every_chip_has_a_row(self):
    self.assertEqual(set(machines._FAMILIES), set(hardware.CHIPS))

  def test_slices_multiply(self):
    found = machines.machine_of(hardware.parse("3xv5e:4x4"))
    self.assertEqual((found.slices, found.hosts, found.num_hosts), (3, 4, 12))

  @parameterized.parameters("h100:12", "h100:4", "v5p:2x1x1")
  def test_parts_of_hosts_are_refused(self, name):
    with self.assertRaisesRegex(ValueError, "hosts of|must be even"):
      machines.machine_of(hardware.parse(name))


if __name__ == "__main__":
  absltest.main()
