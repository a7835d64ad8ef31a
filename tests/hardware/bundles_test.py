"""Cycles of hand-written dumps, counted by hand."""

import pathlib

from absl.testing import absltest

from bertjax.hardware import CHIPS
from bertjax.hardware.bundles import read_dump, read_schedule

_V5E = CHIPS["v5e"]

# 1 + 5 * (1 + 3 * (3) + 1) + 1 bundles are issued.
_NESTED = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %s1 = smov 0 }
   0x1 LB: > { %s2 = sadd.s32 1, %s1 }
   0x2 LB: > > { %v1 = vmatmul.bf16.gmra.mxu0 %v0  ;;  %v2 = vmatmul.f32.gmra.mxu1 %v0 }
   0x3   :  {}
   0x4   : > > { %p1 = scmp.ge.s32.totalorder %s3, 3 /* loop exit test */ }
   0x5   : > { %p2 = scmp.ge.s32.totalorder %s2, 5 /* loop exit test */ } /* note
 on another line */
   0x6   :  { %s9 = smov 0 }
"""  # noqa: E501

# A pipelined loop of 8 iterations: 10 with filling and draining.
_PIPELINED = """\
     0 LB: > { %s1 = sadd.s32 1, %s0 /* iteration index, stage = 1 */ }
   0x1   : > { %1 = vmatmul.msk.bf16.vlgmr.msra.gmra.mxu2 %v0 }
   0x2   : > { %p8 = scmp.ge.s32.totalorder %s11, 10 /* loop exit test */ }
"""

# Registers from the transposing unit hold 8 rows, loaded ones 16.
_TRANSPOSED = """\
     0   :  { %1 = vmatmul.lmr.bf16.gmra.16.mxu0 %v0  ;;  %2 = vmatmul.lmr.bf16.vlgmr.msra.gmra.16.mxu0 %v0 }
   0x1   :  { %3 = vmatmul.bf16.vlgmr.msra.gmra.mxu0 %v0 }
"""  # noqa: E501

# Two loops one after the other, the second with a bound known at run time.
_SEQUENCE = """\
     0 LB: > { %s1 = sadd.s32 1, %s0 }
   0x1   : > { %p1 = scmp.ge.s32.totalorder %s1, 4 /* loop exit test */ }
   0x2 LB: > { %s2 = sadd.s32 1, %s0 }
   0x3   : > { %p2 = scmp.ge.s32.totalorder %s2, %s7 /* loop exit test */ }
"""


class ScheduleTest(absltest.TestCase):
  def test_nested_loops_multiply(self):
    schedule = read_schedule(_NESTED.splitlines(), _V5E)
    self.assertEqual(schedule.bundles, 7)
    self.assertEqual(schedule.cycles, 1 + 5 * (1 + 3 * 3 + 1) + 1)

  def test_the_busiest_matrix_unit_counts(self):
    schedule = read_schedule(_NESTED.splitlines(), _V5E)
    self.assertEqual(schedule.mxu_cycles, 16 * 3 * 5)  # float32: half of it
    self.assertEqual(schedule.bound, 240)

  def test_a_pipelined_loop_computes_in_all_but_two_iterations(self):
    schedule = read_schedule(_PIPELINED.splitlines(), _V5E)
    self.assertEqual(schedule.cycles, 30)
    self.assertEqual(schedule.mxu_cycles, 16 * 8)

  def test_transposed_registers_are_half_full(self):
    schedule = read_schedule(_TRANSPOSED.splitlines(), _V5E)
    self.assertEqual(schedule.mxu_cycles, 8 + 8 + 16)

  def test_a_loop_ends_where_the_next_begins(self):
    schedule = read_schedule(_SEQUENCE.splitlines(), _V5E)
    self.assertEqual(schedule.cycles, 4 * 2 + 2)

  def test_dump_files_are_named_after_operations(self):
    folder = pathlib.Path(self.create_tempdir())
    (folder / "17-my-fusion.2-01-final_bundles.txt").write_text(_NESTED)
    (folder / "17-my-fusion.2-00-schedule-analysis_final_bundles.txt").touch()
    (folder / "18-TLP-hlo.txt").touch()
    self.assertEqual(list(read_dump(folder, _V5E)), ["my-fusion.2"])


if __name__ == "__main__":
  absltest.main()
