"""HLO text is read as it is meant: bytes, loops, collectives, source lines."""

import textwrap

from absl.testing import absltest, parameterized

from bertjax.hardware import CHIPS, price_module, read_collectives
from bertjax.hardware.bundles import Schedule
from bertjax.hardware.hlo import Module, arrays
from bertjax.hardware.traffic import hbm_bytes

_MODULE = """\
HloModule jit_f, is_scheduled=true, num_partitions=12

FileNames
1 "/home/me/model.py"
2 "/venv/lib/site-packages/flax/linear.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=1 function_name_id=1 line=31 end_line=31 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=7 end_line=7 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}


%fused (p.0: f32[9,100], p.1: f32[100], p.2: s32[]) -> f32[9,100] {
  %p.0 = f32[9,100]{1,0:T(8,128)} parameter(0)
  %p.1 = f32[100]{0} parameter(1)
  %p.2 = s32[] parameter(2)
  %old = f32[1,100]{1,0} dynamic-slice(%p.0, %p.2, %p.2)
  %row = f32[1,100]{1,0} bitcast(%p.1)
  %sum = f32[1,100]{1,0} add(%old, %row)
  ROOT %update = f32[9,100]{1,0} dynamic-update-slice(%p.0, %sum, %p.2, %p.2)
}

%cond (s: (s32[], f32[9,100])) -> pred[] {
  %s = (s32[], f32[9,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %bound = s32[] constant(6)
  ROOT %lt = pred[] compare(%i, %bound), direction=LT
}

%body (s.1: (s32[], f32[9,100])) -> (s32[], f32[9,100]) {
  %s.1 = (s32[], f32[9,100]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%s.1), index=0
  %x = f32[9,100]{1,0} get-tuple-element(%s.1), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  %v = f32[100]{0} broadcast(%one), dimensions={}
  %fusion.1 = f32[9,100]{1,0} fusion(%x, %v, %i.1), kind=kLoop, calls=%fused, metadata={op_name="jit(f)/while/body/add" stack_frame_id=2}
  %all-reduce = f32[9,100]{1,0} all-reduce(%fusion.1), channel_id=1, replica_groups=[6,2]<=[2,3,2]T(1,2,0)
  ROOT %t = (s32[], f32[9,100]{1,0}) tuple(%next, %all-reduce)
}

ENTRY %main (a: f32[9,100]) -> f32[9,100] {
  %a = f32[9,100]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %t.1 = (s32[], f32[9,100]{1,0}) tuple(%zero, %a)
  %while = (s32[], f32[9,100]{1,0}) while(%t.1), condition=%cond, body=%body
  %r = f32[9,100]{1,0} get-tuple-element(%while), index=1
  %shift = f32[9,100]{1,0} collective-permute(%r), channel_id=1, source_target_pairs={{0,2},{2,4},{4,0}}
  %twin = f32[9,100]{1,0} fusion(%shift, %a, %zero), kind=kLoop, calls=%fused
  ROOT %neg = f32[9,100]{1,0:S(1)} negate(%twin)
}
"""  # noqa: E501


class ModuleTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.module = Module(_MODULE)
    cls.executed = {e.instruction.name: e for e in cls.module.executed()}

  def test_loops_multiply_what_is_in_them(self):
    self.assertEqual(self.executed["fusion.1"].times, 6)
    self.assertEqual(self.executed["neg"].times, 1)
    self.assertNotIn("old", self.executed)  # inside a fusion
    loop = self.module.computations["main"].by_name["while"]
    self.assertEqual(self.module.trip_count(loop), 6)

  def test_a_slice_updated_in_place_moves_its_bytes_only(self):
    fusion = self.executed["fusion.1"]
    # Old row, vector, index and new row; the result lies in the operand.
    self.assertEqual(
      hbm_bytes(fusion.instruction, fusion.computation, self.module),
      400 + 400 + 4 + 400,
    )

  def test_scratch_memory_is_free(self):
    neg = self.executed["neg"]
    self.assertEqual(
      hbm_bytes(neg.instruction, neg.computation, self.module), 9 * 400
    )

  def test_source_is_the_innermost_line_of_the_user(self):
    fusion = self.executed["fusion.1"].instruction
    for folder in ("site-packages", "dist-packages"):
      module = Module(_MODULE.replace("site-packages", folder))
      self.assertEqual(module.source(fusion), "/home/me/model.py:31")
    self.assertEqual(fusion.op_name, "jit(f)/while/body/add")
    self.assertEqual(self.module.source(self.executed["neg"].instruction), "")

  def test_collectives_have_bytes_axes_and_times(self):
    reduce, shift = read_collectives(self.module)
    mesh = dict(data=2, fsdp=3, model=2)
    self.assertEqual(
      (reduce.kind, reduce.operand_bytes, reduce.times, reduce.group_size),
      ("all-reduce", 3600, 6, 2),
    )
    # Groups {0, 6}, {2, 8}...: neighbours along the first axis.
    self.assertEqual(reduce.groups[0], (0, 6))
    self.assertEqual(reduce.axes(mesh), ("data",))
    self.assertEqual(reduce.sent_bytes, 6 * 3600)  # 2 (n - 1) / n of it
    self.assertEqual((shift.kind, shift.times), ("collective-permute", 1))
    self.assertEqual(shift.axes(mesh), ("fsdp",))
    self.assertEqual(shift.axes(dict(data=12)), ("data",))

  def test_an_operation_takes_what_its_slowest_resource_needs(self):
    chip = CHIPS["v5e"]
    schedules = {"fusion.1": Schedule(bundles=5, cycles=50, mxu_cycles=70)}
    cost = price_module(self.module, schedules, chip)
    rows = {row.name: row for row in cost.rows}
    self.assertEqual(rows["fusion.1"].estimate, 6 * 70)
    self.assertAlmostEqual(
      rows["neg"].estimate, 3600 / chip.hbm_bytes_per_cycle
    )
    self.assertEqual(cost.missing, ["v", "twin", "neg"])
    self.assertEqual(cost.top(1)[0].name, "fusion.1")
    self.assertEqual(
      cost.hbm_bytes, sum(r.times * r.hbm_bytes for r in rows.values())
    )

  def test_text_that_is_no_module_is_refused(self):
    with self.assertRaisesRegex(ValueError, "no HLO module"):
      Module("nothing\n")


_ASYNCHRONOUS = """\
HloModule m, num_partitions=4

%begin (p: f32[8]) -> (f32[8], f32[16], u32[]) {
  %p = f32[8]{0} parameter(0)
  %g.1 = f32[16]{0} all-gather(%p), channel_id=3, replica_groups={{0,1},{2,3}}
  ROOT %s = (f32[8], f32[16], u32[]) custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%carry (q: f32[8], r: f32[8]) -> (f32[8], f32[16]) {
  %q = f32[8]{0} parameter(0)
  %r = f32[8]{0} parameter(1)
  %g.2 = f32[16]{0} all-gather(%q), channel_id=3, replica_groups={{0,1},{2,3}}
  %e = f32[8]{0} exponential(%r)
  ROOT %t = (f32[8], f32[16]) tuple(%e, %g.2)
}

%end (u: f32[8], w: u32[]) -> f32[16] {
  %u = f32[8]{0} parameter(0)
  %w = u32[] parameter(1)
  %g.3 = f32[16]{0} all-gather(%u), channel_id=3, replica_groups={{0,1},{2,3}}
  ROOT %d = f32[16]{0} custom-call(%u, %w, %g.3), custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: f32[8], b: f32[8]) -> f32[16] {
  %a = f32[8]{0} parameter(0)
  %b = f32[8]{0} parameter(1)
  %start = (f32[8], f32[16], u32[]) fusion(%a), kind=kCustom, calls=%begin
  %x = u32[] get-tuple-element(%start), index=2
  %work = (f32[8], f32[16]) fusion(%a, %b), kind=kLoop, calls=%carry
  ROOT %done = f32[16]{0} fusion(%a, %x), kind=kCustom, calls=%end
}
"""  # noqa: E501


class AsynchronousTest(absltest.TestCase):
  """A gather that one fusion begins, a second carries and a third ends."""

  def test_it_counts_once(self):
    (gather,) = read_collectives(Module(_ASYNCHRONOUS))
    self.assertEqual((gather.kind, gather.operand_bytes), ("all-gather", 32))
    self.assertEqual(gather.axes(dict(data=2, model=2)), ("model",))
    self.assertEqual(gather.sent_bytes, 32)

  def test_it_counts_once_if_a_loop_carries_it(self):
    work = "(f32[8], f32[16]) fusion(%a, %b), kind=kLoop, calls=%carry"
    loop = """\
%turn (s: (f32[8], f32[16])) -> (f32[8], f32[16]) {
  %s.1 = (f32[8], f32[16]) parameter(0)
  %x.1 = f32[8]{0} get-tuple-element(%s.1), index=0
  ROOT %f.1 = (f32[8], f32[16]) fusion(%x.1, %x.1), kind=kLoop, calls=%carry
}

%more (s.2: (f32[8], f32[16])) -> pred[] {
  %s.2 = (f32[8], f32[16]) parameter(0)
  ROOT %yes = pred[] constant(true)
}

ENTRY"""
    self.assertIn(work, _ASYNCHRONOUS)
    text = _ASYNCHRONOUS.replace("ENTRY", loop).replace(
      work,
      "(f32[8], f32[16]) while(%start), condition=%more, body=%turn,"
      ' backend_config={"known_trip_count":{"n":"12"}}',
    )
    (gather,) = read_collectives(Module(text))
    self.assertEqual(gather.times, 1)

  def test_only_the_work_beside_it_is_priced(self):
    cost = price_module(Module(_ASYNCHRONOUS), {}, CHIPS["v5e"])
    self.assertEqual([row.name for row in cost.rows], ["work"])
    # %b is read and %e written; what the gather carries is its own affair.
    self.assertEqual(cost.hbm_bytes, 64)


_SCATTERED = """\
HloModule m, num_partitions=4

%all-reduce-scatter (input: f32[8,128]) -> f32[2,128] {
  %input = f32[8,128]{1,0:T(8,128)S(1)} parameter(0)
  %all-reduce.7 = f32[8,128]{1,0:T(8,128)} all-reduce(%input), channel_id=9, replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%plus
  %partition-id.1 = u32[] partition-id()
  %two = u32[] constant(2)
  %row = u32[]{:T(128)} multiply(%partition-id.1, %two)
  %zero = u32[] constant(0)
  ROOT %part = f32[2,128]{1,0:T(8,128)S(1)} dynamic-slice(%all-reduce.7, %row, %zero), dynamic_slice_sizes={2,128}
}

ENTRY %main (g: f32[8,128]) -> f32[2,128] {
  %g = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %fusion.2 = f32[2,128]{1,0:T(8,128)S(1)} fusion(%g), kind=kCustom, calls=%all-reduce-scatter
}
"""  # noqa: E501


class ScatteredTest(parameterized.TestCase):
  """A sum in a fusion of which each device keeps something."""

  def test_an_equal_part_is_a_reduce_scatter(self):
    (found,) = read_collectives(Module(_SCATTERED))
    self.assertEqual((found.kind, found.times), ("reduce-scatter", 1))
    self.assertEqual(found.operand_bytes, 8 * 128 * 4)
    self.assertEqual(found.sent_bytes, 3 / 4 * 8 * 128 * 4)

  def test_parts_of_several_arrays_are_one_reduce_scatter(self):
    text = """\
HloModule m, num_partitions=4

%all-reduce-scatter.3 (p.0: f32[6,128], p.1: f32[4,4,128]) -> (f32[2,128], f32[4,128]) {
  %p.0 = f32[6,128]{1,0:T(8,128)S(1)} parameter(0)
  %zero = f32[] constant(0)
  %pad = f32[8,128]{1,0:T(8,128)} pad(%p.0, %zero), padding=0_2x0_0
  %p.1 = f32[4,4,128]{2,1,0} parameter(1)
  %flat = f32[16,128]{1,0} bitcast(%p.1)
  %all-reduce.94 = (f32[8,128]{1,0:T(8,128)}, f32[16,128]{1,0:T(8,128)}) all-reduce(%pad, %flat), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%plus
  %first = f32[8,128]{1,0} get-tuple-element(%all-reduce.94), index=0
  %row = u32[] partition-id()
  %slice.0 = f32[2,128]{1,0} dynamic-slice(%first, %row, %row), dynamic_slice_sizes={2,128}
  %second = f32[16,128]{1,0} get-tuple-element(%all-reduce.94), index=1
  %slice.1 = f32[4,128]{1,0} dynamic-slice(%second, %row, %row), dynamic_slice_sizes={4,128}
  ROOT %parts = (f32[2,128]{1,0}, f32[4,128]{1,0}) tuple(%slice.0, %slice.1)
}

ENTRY %main (a: f32[6,128], b: f32[4,4,128]) -> (f32[2,128], f32[4,128]) {
  %a = f32[6,128]{1,0} parameter(0)
  %b = f32[4,4,128]{2,1,0} parameter(1)
  ROOT %fusion = (f32[2,128]{1,0}, f32[4,128]{1,0}) fusion(%a, %b), kind=kCustom, calls=%all-reduce-scatter.3
}
"""  # noqa: E501
    (found,) = read_collectives(Module(text))
    self.assertEqual(found.kind, "reduce-scatter")
    self.assertEqual(found.operand_bytes, (8 + 16) * 128 * 4)
    whole = text.replace("tuple(%slice.0, %slice.1)", "tuple(%first, %slice.1)")
    (found,) = read_collectives(Module(whole))
    self.assertEqual(found.kind, "all-reduce")

  @parameterized.parameters(
    # More than a fourth is kept, something else reads all of it, nothing does.
    ("%part = f32[2,128]", "%part = f32[6,128]"),
    ("ROOT %part", "%all = f32[8,128]{1,0} copy(%all-reduce.7)\n  ROOT %part"),
    ("dynamic-slice(%all-reduce.7,", "dynamic-slice(%input,"),
  )
  def test_all_else_stays_an_all_reduce(self, old, new):
    self.assertIn(old, _SCATTERED)
    (found,) = read_collectives(Module(_SCATTERED.replace(old, new)))
    self.assertEqual(found.kind, "all-reduce")


_ROWS = """\
HloModule rows, is_scheduled=true

%take (p.0: f32[90,128], p.1: s32[4]) -> f32[4,128] {
  %p.0 = f32[90,128]{1,0} parameter(0)
  %p.1 = s32[4]{0} parameter(1)
  %taken = f32[4,128]{1,0} gather(%p.0, %p.1), offset_dims={1}
  ROOT %same = f32[4,128]{1,0} reshape(%taken)
}

%add (q.0: f32[90,128], q.1: s32[4], q.2: f32[4,128]) -> f32[90,128] {
  %q.0 = f32[90,128]{1,0} parameter(0)
  %q.1 = s32[4]{0} parameter(1)
  %q.2 = f32[4,128]{1,0} parameter(2)
  ROOT %sum = f32[90,128]{1,0} scatter(%q.0, %q.1, %q.2), to_apply=%plus
}

ENTRY %main (table: f32[90,128], ids: s32[4]) -> f32[90,128] {
  %table = f32[90,128]{1,0} parameter(0)
  %ids = s32[4]{0} parameter(1)
  %found = f32[4,128]{1,0} fusion(%table, %ids), kind=kCustom, calls=%take
  ROOT %new = f32[90,128]{1,0} fusion(%table, %ids, %found), kind=kCustom, calls=%add
}
"""  # noqa: E501


class RowsTest(absltest.TestCase):
  """A table of which only some rows are read or added to."""

  def test_only_those_rows_move(self):
    module = Module(_ROWS)
    moved = {
      e.instruction.name: hbm_bytes(e.instruction, e.computation, module)
      for e in module.executed()
    }
    rows, ids = 4 * 128 * 4, 4 * 4
    self.assertEqual(moved["found"], 2 * rows + ids)
    # Old rows, what is added, and the sums in their place.
    self.assertEqual(moved["new"], 3 * rows + ids)


class GpuTest(absltest.TestCase):
  def test_transfers_and_scratch_memory_are_no_traffic(self):
    text = """HloModule m, num_partitions=2

ENTRY %main (a: bf16[64,64]) -> bf16[64,64] {
  %a = bf16[64,64]{1,0} parameter(0)
  %scatter = ((bf16[64,64]{1,0}), bf16[32,64]{1,0}) reduce-scatter-start(%a), channel_id=1, replica_groups={{0,1}}, dimensions={0}, to_apply=%plus
  %part = bf16[32,64]{1,0} reduce-scatter-done(%scatter)
  %swap = ((bf16[64,64]{1,0}), bf16[64,64]{1,0}) all-to-all-start(%a), channel_id=2, replica_groups={{0,1}}, dimensions={0}
  %swapped = bf16[64,64]{1,0} all-to-all-done(%swap)
  %gemm = (bf16[64,64]{1,0}, s8[4194304]{0}) custom-call(%a, %swapped), custom_call_target="__cublas$gemm"
  ROOT %product = bf16[64,64]{1,0} get-tuple-element(%gemm), index=0
}
"""  # noqa: E501
    module = Module(text)
    cost = price_module(module, {}, CHIPS["h100"])
    self.assertEqual([row.name for row in cost.rows], ["gemm"])
    self.assertEqual(cost.hbm_bytes, 3 * 64 * 64 * 2)
    self.assertEqual(
      [(c.kind, c.operand_bytes) for c in read_collectives(module)],
      [("reduce-scatter", 8192), ("all-to-all", 8192)],
    )


class TwinTest(absltest.TestCase):
  def test_equal_operations_share_a_schedule(self):
    text = textwrap.dedent("""\
      HloModule m

      ENTRY %main (a: f32[8]) -> f32[8] {
        %a = f32[8]{0} parameter(0)
        %b = f32[8]{0} exponential(%a)
        ROOT %c = f32[8]{0} exponential(%b)
      }
      """)
    schedules = {"b": Schedule(bundles=3, cycles=33, mxu_cycles=0)}
    cost = price_module(Module(text), schedules, CHIPS["v5e"])
    self.assertEqual([row.cycles for row in cost.rows], [33, 33])
    self.assertEmpty(cost.missing)


class ArrayTest(parameterized.TestCase):
  @parameterized.parameters(
    ("bf16[3,5]{1,0:T(8,128)(2,1)}", 30, True),
    ("f32[7]{0:S(1)}", 28, False),
    ("pred[]", 1, True),
    ("f8e4m3fn[6]{0}", 6, True),
    ("s4[6]{0}", 3, True),
    ("u64[2,0]", 0, True),
  )
  def test_bytes_and_memory(self, text, size, in_hbm):
    (array,) = arrays(text)
    self.assertEqual((array.bytes, array.in_hbm), (size, in_hbm))

  def test_tuples_are_flattened(self):
    found = arrays("(f32[2]{0}, /*index=1*/(s32[], token[]))")
    self.assertEqual([a.bytes for a in found], [8, 4])


class GroupsTest(parameterized.TestCase):
  @parameterized.parameters(
    ("mesh['a'=2,'b'=3], device_ids=([6]) {'b'}", ((0, 1, 2), (3, 4, 5))),
    ("mesh['a'=2,'b'=3] {'a'}", ((0, 3), (1, 4), (2, 5))),
    (
      "mesh['a'=2,'b'=1,'c'=3], device_ids=([3,2]T(1,0)) {'a'}",
      ((0, 1), (2, 3), (4, 5)),
    ),
    ("mesh['a'=4] {'a':(1)2}", ((0, 2), (1, 3))),
    ("mesh['a'=4] {'a':(2)2}", ((0, 1), (2, 3))),
  )
  def test_groups_of_named_axes(self, groups, expected):
    text = f"""\
HloModule m, num_partitions=6

ENTRY %main (p: f32[4]) -> f32[8] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %g = f32[8]{{0}} all-gather(%p), replica_groups={groups}
}}
"""
    (found,) = read_collectives(Module(text))
    self.assertEqual(found.groups, expected)

  @parameterized.parameters(
    "branch_computations={%no, %yes}",
    "true_computation=%yes, false_computation=%no",
  )
  def test_a_collective_knows_its_branch(self, branches):
    text = f"""\
HloModule m, num_partitions=2

%no (a: f32[4]) -> f32[4] {{
  ROOT %a = f32[4]{{0}} parameter(0)
}}

%yes (b: f32[4]) -> f32[4] {{
  %b = f32[4]{{0}} parameter(0)
  ROOT %r = f32[4]{{0}} all-reduce(%b), replica_groups={{{{0,1}}}}
}}

ENTRY %main (p: f32[4], c: pred[]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  %c = pred[] parameter(1)
  %before = f32[4]{{0}} all-reduce(%p), replica_groups={{{{0,1}}}}
  ROOT %q = f32[4]{{0}} conditional(%c, %before, %before), {branches}
}}
"""
    found = read_collectives(Module(text))
    self.assertEqual([c.branch for c in found], [(), (1,)])


class SlicesTest(absltest.TestCase):
  def test_what_the_host_carries_between_slices_is_a_collective(self):
    text = """HloModule two_slices, num_partitions=4

ENTRY %main (p: f32[2,8,128]) -> f32[2,8,128] {
  %p = f32[2,8,128]{2,1,0} parameter(0)
  %token = token[] after-all()
  %send = (f32[2,8,128]{2,1,0}, u32[], token[]) send(%p, %token), channel_id=8, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,3:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  %recv = (f32[2,8,128]{2,1,0}, u32[], token[]) recv(%token), channel_id=9, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_target="{1,3:4}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %out = f32[2,8,128]{2,1,0} get-tuple-element(%recv), index=0
}
"""  # noqa: E501
    (found,) = read_collectives(Module(text))
    self.assertEqual(found.kind, "all-reduce")
    self.assertEqual(found.groups, ((1, 3, 4),))
    self.assertEqual(found.slices, 3)
    self.assertEqual(found.operand_bytes, 2 * 8 * 128 * 4)
    self.assertAlmostEqual(found.sent_bytes, 2 * 2 / 3 * 8192)


if __name__ == "__main__":
  absltest.main()
