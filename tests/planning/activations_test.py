"""What the forward pass keeps is told apart from all other temporaries."""

import importlib.util
import unittest

from absl.testing import absltest, parameterized

from bertjax.hardware import compile_for
from bertjax.hardware.hlo import Module
from bertjax.planning.activations import kept_bytes
from tests.hardware import programs

# A loop forward and a loop backward: a stack of kept values, once in a copy; a
# weight that the first loop carries unchanged; a value in on-chip memory.
_MODULE = """\
HloModule jit_step, is_scheduled=true

%cond (s.0: (f32[3,8], f32[3,5], f32[3,7])) -> pred[] {
  %s.0 = (f32[3,8]{1,0}, f32[3,5]{1,0}, f32[3,7]{1,0:S(1)}) parameter(0)
  ROOT %less = pred[] constant(true)
}

%forward (s: (f32[3,8], f32[3,5], f32[3,7])) -> (f32[3,8], f32[3,5], f32[3,7]) {
  %s = (f32[3,8]{1,0}, f32[3,5]{1,0}, f32[3,7]{1,0:S(1)}) parameter(0)
  %old = f32[3,8]{1,0} get-tuple-element(%s), index=0
  %weight = f32[3,5]{1,0} get-tuple-element(%s), index=1
  %near = f32[3,7]{1,0:S(1)} get-tuple-element(%s), index=2
  %new = f32[3,8]{1,0} tanh(%old), metadata={op_name="jit(step)/jvp(M)/while/body/tanh"}
  %next = f32[3,7]{1,0:S(1)} tanh(%near), metadata={op_name="jit(step)/jvp(M)/while/body/tanh"}
  ROOT %t = (f32[3,8]{1,0}, f32[3,5]{1,0}, f32[3,7]{1,0:S(1)}) tuple(%new, %weight, %next)
}

%backward (r: (f32[3,8], f32[3,5], f32[3,7], f32[2])) -> (f32[3,8], f32[3,5], f32[3,7], f32[2]) {
  ROOT %r = (f32[3,8]{1,0}, f32[3,5]{1,0}, f32[3,7]{1,0:S(1)}, f32[2]{0}) parameter(0)
}

ENTRY %main (a: f32[3,8], w: f32[3,5]) -> f32[2] {
  %a = f32[3,8]{1,0} parameter(0)
  %w = f32[3,5]{1,0} parameter(1)
  %n = f32[3,7]{1,0:S(1)} exponential(%w), metadata={op_name="jit(step)/jvp(M)/exp"}
  %t.1 = (f32[3,8]{1,0}, f32[3,5]{1,0}, f32[3,7]{1,0:S(1)}) tuple(%a, %w, %n)
  %while.1 = (f32[3,8]{1,0}, f32[3,5]{1,0}, f32[3,7]{1,0:S(1)}) while(%t.1), condition=%cond, body=%forward, metadata={op_name="jit(step)/jvp(M)/while"}
  %stack = f32[3,8]{1,0} get-tuple-element(%while.1), index=0
  %same = f32[3,5]{1,0} get-tuple-element(%while.1), index=1
  %chip = f32[3,7]{1,0:S(1)} get-tuple-element(%while.1), index=2
  %head = f32[2]{0} reduce(%stack), metadata={op_name="jit(step)/jvp(M)/sum"}
  %lone = f32[11]{0} reduce(%stack), metadata={op_name="jit(step)/jvp(M)/max"}
  %half = f32[17]{0} constant({...}), metadata={op_name="jit(step)/jvp(M)/mul"}
  %less.1 = f32[17]{0} negate(%half), metadata={op_name="jit(step)/transpose(jvp(M))/mul"}
  %far = f32[13]{0} reduce(%stack), metadata={op_name="jit(step)/jvp(M)/min"}
  %there = f32[13]{0:S(1)} copy(%far)
  %moved = f32[3,8]{1,0:S(1)} copy(%stack)
  %t.2 = (f32[3,8]{1,0:S(1)}, f32[3,5]{1,0}, f32[3,7]{1,0:S(1)}, f32[2]{0}) tuple(%moved, %same, %chip, %head)
  %while.2 = (f32[3,8]{1,0}, f32[3,5]{1,0}, f32[3,7]{1,0:S(1)}, f32[2]{0}) while(%t.2), condition=%cond, body=%backward, metadata={op_name="jit(step)/transpose(jvp(M))/while"}
  %slope = f32[2]{0} get-tuple-element(%while.2), index=3
  %again = f32[3,8]{1,0} multiply(%stack, %stack), metadata={op_name="jit(step)/transpose(jvp(M))/mul"}
  %used = f32[13]{0} negate(%there), metadata={op_name="jit(step)/transpose(jvp(M))/neg"}
  ROOT %out = f32[2]{0} add(%slope, %lone), metadata={op_name="jit(step)/add"}
}
"""  # noqa: E501


class KeptBytesTest(parameterized.TestCase):
  def test_a_value_counts_once_where_it_lies(self):
    # The stack, though it is read twice, the head's sum, and what is read from
    # a copy alone.
    self.assertEqual(kept_bytes(Module(_MODULE)), 4 * (3 * 8 + 2 + 13))

  def test_a_program_without_gradient_keeps_nothing(self):
    text = _MODULE.replace("transpose(jvp(M))", "M")
    self.assertEqual(kept_bytes(Module(text)), 0)

  @parameterized.parameters("%new, %next, %next", "%weight, %new, %next")
  def test_what_a_loop_changes_is_no_weight_that_it_carries(self, state):
    text = _MODULE.replace("tuple(%new, %weight, %next)", f"tuple({state})")
    self.assertEqual(kept_bytes(Module(text)), 4 * (3 * 8 + 2 + 13 + 3 * 5))


@unittest.skipUnless(
  importlib.util.find_spec("libtpu"),
  "libtpu is not installed: pip install 'bertjax[test]'",
)
class CompiledTest(absltest.TestCase):
  def test_a_scan_keeps_stacks_of_what_its_gradient_needs(self):
    # Too many for on-chip memory. JAX keeps x, y = tanh(x w) and 1 - y^2 or y.
    count = 160
    program = compile_for("v4:2x2x1", programs.layers, count=count)
    kept = kept_bytes(program.module)
    self.assertEqual(kept, 3 * count * 1024 * 512 * 2)
    # Beside them the program has hardly anything.
    self.assertBetween(program.memory.temporaries, kept, 1.01 * kept)


if __name__ == "__main__":
  absltest.main()
