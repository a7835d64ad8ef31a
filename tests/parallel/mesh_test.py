import jax
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from bertjax import hardware
from bertjax.hardware import topologies
from bertjax.parallel import mesh as mesh_lib
from bertjax.parallel import sharding


class MeshTest(parameterized.TestCase):
  def test_minus_one_takes_what_is_left(self):
    mesh = mesh_lib.make_mesh(model=2)
    self.assertEqual(
      dict(mesh.shape), {"data": 4, "fsdp": 1, "model": 2, "seq": 1}
    )

  @parameterized.parameters(
    (dict(data=3), "data=3.* does not divide 8 devices"),
    (dict(model=3), "model=3.* does not divide 8 devices"),
    (dict(fsdp=-1), "at most one may be -1"),
    (dict(seq=0), "sizes are positive"),
  )
  def test_a_mesh_that_does_not_fit_is_refused(self, sizes, message):
    with self.assertRaisesRegex(ValueError, message):
      mesh_lib.make_mesh(**sizes)

  @parameterized.parameters(
    (dict(fsdp=4), (2, 4, 1, 1), "data"),
    (dict(fsdp=2, model=2), (2, 2, 2, 1), "data"),
    (dict(data=1, fsdp=-1, model=2), (1, 4, 2, 1), "fsdp"),
  )
  def test_slices_part_an_axis_of_the_batch(self, sizes, shape, axis):
    topology = hardware.parse("2xv5e:2x2")
    devices = topologies.devices(topology)
    mesh = mesh_lib.make_mesh(**sizes, devices=devices)
    self.assertEqual(mesh.devices.shape, shape)
    self.assertCountEqual(mesh.devices.flat, devices)
    halves = np.split(mesh.devices, 2, mesh_lib.AXES.index(axis))
    for number, half in enumerate(halves):
      self.assertEqual({d.slice_index for d in half.flat}, {number})
    self.assertTrue(all("Auto" in str(t) for t in mesh.axis_types))

  @parameterized.parameters(
    ("v5e:8x8", dict(fsdp=4), (16, 4, 1, 1)),
    ("v5p:4x4x4", dict(model=2), (32, 1, 2, 1)),
  )
  def test_an_axis_takes_a_part_of_a_torus_dimension(
    self, topology, sizes, shape
  ):
    devices = topologies.devices(hardware.parse(topology))
    mesh = mesh_lib.make_mesh(**sizes, devices=devices)
    self.assertEqual(mesh.devices.shape, shape)
    self.assertCountEqual(mesh.devices.flat, devices)
    for group in mesh.devices.reshape(shape[0], -1):
      coords = np.array([device.coords for device in group])
      sides = coords.max(0) - coords.min(0)
      self.assertCountEqual(sides[sides > 0], [len(group) - 1])

  def test_slices_that_divide_no_axis_of_the_batch_are_refused(self):
    devices = topologies.devices(hardware.parse("2xv5e:2x2"))
    with self.assertRaisesRegex(ValueError, "data=1, fsdp=1: the 2 slices"):
      mesh_lib.make_mesh(model=8, devices=devices)

  def test_a_dimension_that_does_not_divide_is_named(self):
    mesh = mesh_lib.make_mesh(model=4)
    params = {"table": jax.ShapeDtypeStruct((30, 8), "float32")}
    with self.assertRaisesRegex(
      ValueError, "'vocab' of size 30 .*'table'.*pad"
    ):
      sharding.parameter_shardings(params, {"table": ("vocab", "embed")}, mesh)

  def test_heads_that_do_not_divide_say_what_would(self):
    mesh = mesh_lib.make_mesh(data=2, model=4)
    params = {"query": jax.ShapeDtypeStruct((16, 6, 3), "float32")}
    with self.assertRaisesRegex(
      ValueError,
      "mesh.model=4 does not divide axis 'heads' of size 6 of parameter"
      " 'query'; use a divisor of 6 .* such as 2",
    ):
      axes = {"query": ("embed", "heads", "head_dim")}
      sharding.parameter_shardings(params, axes, mesh)

  def test_an_unknown_logical_name_is_refused(self):
    with self.assertRaisesRegex(ValueError, "'vocabulary' is in no sharding"):
      sharding.spec(("vocabulary",))

  def test_names_become_mesh_axes(self):
    self.assertEqual(
      sharding.spec(("batch", "length", None)),
      P(("data", "fsdp"), "seq", None),
    )


if __name__ == "__main__":
  absltest.main()
