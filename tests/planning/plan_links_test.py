"""What a step exchanges, and how long it takes."""

from absl.testing import absltest, parameterized

from bertjax import hardware
from bertjax.hardware.hlo import Module
from bertjax.plan import Plan
from bertjax.planning import links, page
from bertjax.planning.kinds import kinds
from tests.planning.facts import FACTS

_REFRESH = """\
HloModule m, num_partitions=2

%idle (a: f32[1024]) -> f32[1024] {
  IDLE
}

%refresh (b: f32[1024]) -> f32[1024] {
  %b = f32[1024]{0} parameter(0)
  %t = f32[1024]{0} tanh(%b)
  ROOT %r = f32[1024]{0} all-reduce(%t), replica_groups={{0,1}}
}

ENTRY %main (p: f32[1024], c: pred[]) -> f32[1024] {
  %p = f32[1024]{0} parameter(0)
  %c = pred[] parameter(1)
  %e = f32[1024]{0} exponential(%p)
  ROOT %q = f32[1024]{0} conditional(%c, %e, %e), branch_computations={%idle, %refresh}
}
"""  # noqa: E501


class LinksTest(parameterized.TestCase):
  def test_a_step_takes_one_branch_of_a_conditional(self):
    always, skip, full, compressed, rest = (
      hardware.Collective("all-reduce", 1, (), 1, "", "", branch=branch)
      for branch in ((), (1,), (1, 0), (1, 1), (0, 0, 2))
    )
    topology = hardware.parse("v5e:2x2")

    def own(*collectives):
      found = kinds(topology, collectives, None)
      return [list(kind.collectives) for kind in found]

    self.assertCountEqual(
      own(always, skip, full, compressed, rest),
      [
        [always],
        [always, rest],
        [always, skip, full],
        [always, skip, compressed],
      ],
    )
    self.assertEqual(own(always), [[always]])
    self.assertEqual(own(), [[]])

  def test_a_kind_of_step_computes_in_its_own_branch(self):
    topology = hardware.parse("v5e:2x2")
    rows = [
      hardware.Row("", "", 1, 1, 0, 0, 0, estimate, "", "", branch)
      for branch, estimate in (
        ((), 1e3), ((1, 0), 1e4), ((1, 1), 1e5), ((1, 1, 0), 1e6), ((0,), 1e7),
      )
    ]  # fmt: skip
    full, compressed = (
      hardware.Collective("all-reduce", n, ((0, 1),), 1, "", "", branch=branch)
      for n, branch in ((4_000, (1, 0)), (10, (1, 1)))
    )
    cost = hardware.Cost(topology.chip, rows)
    found = kinds(topology, [full, compressed], cost)
    self.assertEqual(
      [(k.work.cycles, list(k.collectives)) for k in found],
      [
        (10_001_000, []),
        (1_101_000, [compressed]),
        (11_000, [full]),
      ],  # the longest first
    )

  @parameterized.parameters(
    ("ROOT %n = f32[1024]{0} parameter(0)", []),
    (
      "%a = f32[1024]{0} parameter(0)\n  ROOT %n = f32[1024]{0} negate(%a)",
      ["n"],
    ),
  )
  def test_a_branch_that_exchanges_something_is_not_always_taken(
    self, idle, other
  ):
    """Some optimizers refresh every tenth step what the others use."""
    module = Module(_REFRESH.replace("IDLE", idle))
    topology = hardware.parse("v5e:2x2")
    cost = hardware.price_module(module, {}, topology.chip)
    collectives = hardware.read_collectives(module)
    taken, left = kinds(topology, collectives, cost)
    self.assertEqual([row.name for row in taken.work.rows], ["e", "t"])
    self.assertEqual([*taken.collectives], collectives)
    self.assertEqual([row.name for row in left.work.rows], ["e", *other])
    self.assertEmpty(left.collectives)
    self.assertEqual(left.exchange_s, 0)
    made = Plan(
      topology,
      FACTS,
      steps=10,
      needed_bytes=4,
      memory=hardware.Memory(1, 1, 0, 1, 1),
      collectives=tuple(collectives),
      cost=cost,
    )
    text = page.render(made)
    self.assertRegex(text, "other steps .*: compute .*, exchange 0 us")
    self.assertIn("10 steps in at most ", text)

  def test_the_longest_kind_of_step_is_first_though_more_of_it_hides(self):
    topology = hardware.parse("v5e:2x2")
    rows, collectives = [], []
    # 111 s one after the other, 97 s.
    for branch, (compute, exchange) in enumerate(((81.1, 29.8), (96.4, 0.94))):
      cycles = compute * topology.chip.clock
      rows.append(
        hardware.Row("", "", 1, 1, 0, 0, 0, cycles, "", "", (branch,))
      )
      collectives.append(
        hardware.Collective(
          "collective-permute",
          int(exchange * 45e9),
          ((0, 1),),
          *(1, "", ""),
          branch=(branch,),
        )
      )
    cost = hardware.Cost(topology.chip, rows)
    found = kinds(topology, collectives, cost)
    self.assertEqual(
      [(round(k.compute_s, 2), round(k.exchange_s, 2)) for k in found],
      [(96.4, 0.94), (81.1, 29.8)],
    )
    made = Plan(
      topology,
      FACTS,
      steps=3_600,
      needed_bytes=4,
      memory=hardware.Memory(1, 1, 0, 1, 1),
      collectives=tuple(collectives),
      cost=cost,
    )
    text = page.render(made)
    self.assertIn("other steps  81.1 s: compute 81.1 s, exchange 29.8 s", text)
    self.assertIn("3,600 steps in at most 4.02 days", text)
    self.assertEqual(page.figures(made)["kinds"][1]["step_s"], 81.1)

  @parameterized.parameters(
    # Half of all bytes cross the middle of the torus, over 16 links and the 16
    # that close the rings: those of 128 chips, each way.
    ("all-to-all", "v5e:16x16", 256, 1e8, 128 * 5e7 / (32 * 45e9)),
    # A quarter to the next one, half a quarter over two links to the farthest.
    ("all-to-all", "v5e:4x4", 4, 1e8, (1e8 / 4 + 2 * 1e8 / 8) / 45e9),
    ("collective-permute", "v5e:4x4", 2, 1e8, 1e8 / 45e9),
    # The switch has them all.
    ("all-to-all", "h100:8", 8, 1e8, 7 / 8 * 1e8 / 450e9),
    ("collective-permute", "h100:8", 2, 1e8, 1e8 / 450e9),
  )
  def test_what_is_no_ring_passes_more_links(
    self, kind, topology, size, operand, seconds
  ):
    collective = hardware.Collective(
      kind, int(operand), (tuple(range(size)),), 3, "", ""
    )
    self.assertAlmostEqual(
      links.seconds(hardware.parse(topology), [collective]), 3 * seconds
    )

  def _all_reduce(self, *groups, slices=1):
    return hardware.Collective(
      "all-reduce", 4_000, groups, 3, "", "", slices=slices
    )

  def test_slices_part_data_or_fsdp(self):
    two = hardware.parse("2xv5e:2x2")
    pairs = self._all_reduce((0, 1), (2, 3))
    for sizes, axes in (((4, 2), ("fsdp",)), ((2, 4), ()), ((1, 8), ())):
      mesh = dict(zip(("data", "fsdp", "model", "seq"), (*sizes, 1, 1)))
      self.assertEqual(links.axes(pairs, two, mesh), axes)
    whole = self._all_reduce((0, 1, 2, 3))
    mesh = dict(data=1, fsdp=8, model=1, seq=1)
    self.assertEqual(links.axes(whole, two, mesh), ("fsdp",))
    between = self._all_reduce((1, 2), slices=2)
    self.assertEqual(links.axes(between, two, mesh), ("slice",))

  @parameterized.parameters(
    ("v5e", (0, 1, 2, 3), 1, 90e9),
    ("v5e", (1, 2), 2, 3.125e9),
    ("v5p", (1, 2, 3), 3, 6.25e9),
    ("v6e", (1, 2), 2, 12.5e9),
  )
  def test_what_crosses_slices_takes_the_network(
    self, chip, group, slices, bandwidth
  ):
    collective = self._all_reduce(group, slices=slices)
    shape = "2x2x2" if chip == "v5p" else "2x2"
    topology = hardware.parse(f"{max(2, slices)}x{chip}:{shape}")
    n = len(group)
    self.assertAlmostEqual(
      links.seconds(topology, [collective] * 2),
      2 * 3 * 4_000 * 2 * (n - 1) / n / bandwidth,
    )

  def test_a_network_that_is_not_published_gives_no_time(self):
    v4 = hardware.parse("2xv4:2x2x2")
    across = self._all_reduce((1, 2), slices=2)
    self.assertIsNone(links.seconds(v4, [across]))
    self.assertIsNotNone(links.seconds(v4, [self._all_reduce((0, 1))]))


if __name__ == "__main__":
  absltest.main()
