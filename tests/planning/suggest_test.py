"""What a plan suggests is the first change that the compiler found room for."""

import dataclasses
import pathlib
from unittest import mock

from absl.testing import absltest

from bertjax import hardware
from bertjax import plan as plan_lib
from bertjax.config import settings
from bertjax.hardware import compiling, topologies
from bertjax.planning import page
from tests import tiny
from tests.planning.facts import FACTS

_GIB = 2**30
_FACTS = dataclasses.replace(FACTS, mesh=dict(data=4, fsdp=1, model=1, seq=1))


class SuggestTest(absltest.TestCase):
  def suggested(self, needs, **changes):
    """The suggestion, and (microbatches, remat) of what was compiled."""
    tried = []

    def compiled(topology, target, *, settings, vocab_size):
      del target, vocab_size
      remat = settings.model.get("remat")
      tried.append((settings.microbatches, remat))
      needed = needs(settings.microbatches, remat)
      if needed > 16 * _GIB:
        raise hardware.OutOfMemory("full", needed, 16 * _GIB, _FACTS)
      memory = hardware.Memory(0, 0, 0, needed, 0)
      return hardware.Program(topology, "HloModule m", memory, _FACTS)

    stage = settings(tiny.config(pathlib.Path("nowhere"), **changes))
    with mock.patch.object(hardware, "compile_for", compiled):
      return plan_lib.plan(stage, "v5e:2x2").suggestion, tried

  def test_microbatches_come_first(self):
    found, tried = self.suggested(lambda parts, _: 60 * _GIB // parts)
    self.assertEqual(found.fields, "microbatches=4")
    self.assertEqual(found.needed_bytes, 15 * _GIB)
    self.assertEqual(tried, [(1, None), (4, None)])

  def test_what_turns_out_too_large_is_not_suggested(self):
    # Less is won than a plain division promises.
    found, tried = self.suggested(lambda parts, _: (10 + 50 // parts) * _GIB)
    self.assertEqual(found.fields, "microbatches=8")
    self.assertEqual([parts for parts, _ in tried], [1, 4, 8])

  def test_what_the_compiler_does_not_survive_is_not_suggested(self):
    def needs(parts, _):
      if parts == 4:
        raise hardware.CompilerEnded("The compiler was killed.")
      return 60 * _GIB // parts

    self.assertEqual(self.suggested(needs)[0].fields, "microbatches=8")

  def test_remat_comes_after_microbatches(self):
    found, _ = self.suggested(lambda _, remat: (3 if remat else 17) * _GIB)
    self.assertEqual(found.fields, "model.remat=full")

  def test_a_config_that_names_its_remat_keeps_it(self):
    found, tried = self.suggested(
      lambda *_: 17 * _GIB, model=dict(remat="products")
    )
    self.assertIsNone(found)
    self.assertEqual({remat for _, remat in tried}, {"products"})

  def test_the_compiler_knows_better_than_the_data_sheet_what_is_there(self):
    stage = settings(tiny.config(pathlib.Path("nowhere")))
    error = hardware.OutOfMemory("full", 15.9 * _GIB, 15.75 * _GIB, _FACTS)
    with mock.patch.object(hardware, "compile_for", side_effect=error):
      made = plan_lib.plan(stage, "v5e:2x2", suggest=False)
    self.assertIn(
      "DOES NOT FIT: 15.90 GiB of 15.75 GiB per device", page.render(made)
    )
    self.assertEqual(page.figures(made)["available_bytes"], 15.75 * _GIB)

  def test_a_gpu_is_asked_for_room_too(self):
    """XLA's compiler for GPUs compiles what they have no room for."""

    def compiled(gib):
      sizes = dict(arguments=gib * _GIB, outputs=0, aliased=0, temporaries=0)
      return "HloModule m", sizes | dict(code=0), _FACTS

    with (
      mock.patch.object(topologies, "require_compiler"),
      mock.patch.object(compiling, "_run_worker"),
      mock.patch.object(
        compiling, "_load", side_effect=[compiled(90), compiled(70)]
      ),
      mock.patch.object(compiling.gpu, "read_kernels", return_value=()),
    ):
      stage = settings(tiny.config(pathlib.Path("nowhere")))
      text = page.render(plan_lib.plan(stage, "h100:4"))
    self.assertIn("DOES NOT FIT: 90.00 GiB of 79.11 GiB per device", text)
    self.assertIn("fit with --config.microbatches=2 (70.00 GiB)", text)


if __name__ == "__main__":
  absltest.main()
