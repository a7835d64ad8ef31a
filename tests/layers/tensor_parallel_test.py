"""What the devices of `mesh.model` send each other, and how often."""

import importlib.util
import unittest

import numpy as np
from absl.testing import absltest

from bertjax import hardware
from tests.layers import tensor_parallel_programs


@unittest.skipUnless(
  importlib.util.find_spec("libtpu"),
  "libtpu is not installed: pip install 'bertjax[test]'",
)
class TensorParallelTest(absltest.TestCase):
  def test_each_sublayer_sends_two_activations_in_the_compute_dtype(self):
    shape, mlp_dim = (4, 128, 256), 512
    program = hardware.compile_for(
      "v5e:2x2",
      tensor_parallel_programs.gradients,
      shape=shape,
      mlp_dim=mlp_dim,
    )
    mesh = {"data": 2, "fsdp": 1, "model": 2, "seq": 1}
    sent = {}
    for found in hardware.read_collectives(program.module):
      axes = found.axes(mesh)
      sent[axes] = sent.get(axes, 0) + found.operand_bytes
    rows = np.prod(shape) // mesh["data"]
    # A result and the gradient of an input, two bytes a number; queries, keys
    # and values have one input.
    self.assertEqual(sent.pop(("model",)), 2 * 2 * rows * 2)
    # Gradients of the parameters: four, and half of each kernel a device.
    e, f = shape[-1], mlp_dim
    attention = 4 * e * e // 2 + 3 * e // 2 + e
    self.assertEqual(
      sent, {("data",): 4 * (attention + 2 * e * f // 2 + f // 2 + e)}
    )


if __name__ == "__main__":
  absltest.main()
