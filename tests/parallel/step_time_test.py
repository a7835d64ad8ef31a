"""When compression pays, against sums done by hand."""

from absl.testing import absltest, parameterized

from bertjax.parallel import wire
from bertjax.parallel.step_time import Network, Step

# A million numbers: 2 MB in 16 bits, of which a ring of 4 sends 1.5 times.
_SHAPES = ((1000, 1000),)
_RING = 3e6


class StepTimeTest(parameterized.TestCase):
  def test_a_step_is_computation_and_exchange(self):
    step = Step(_SHAPES, compute_s=0.5)
    network = Network(bandwidth=1e6, latency_s=0.01)
    # 3 MB at 1 MB/s in 2 * 3 messages of 10 ms.
    self.assertAlmostEqual(step.full_s(4, network), 0.5 + 3 + 0.06)
    sent = wire.compressed_bytes(_SHAPES, 4)
    self.assertAlmostEqual(
      step.compressed_s(4, network), 0.5 + sent / 1e6 + 0.06
    )

  def test_without_computation_it_is_the_ratio_of_bytes(self):
    step = Step(_SHAPES, compute_s=1e-9)
    ratio = _RING / wire.compressed_bytes(_SHAPES, 4)
    self.assertAlmostEqual(step.speedup(4, Network(1.0)), ratio, places=4)
    self.assertBetween(ratio, 15, 16)

  def test_a_fast_network_leaves_the_cost_of_coding(self):
    step = Step(_SHAPES, compute_s=0.4, coding_s=0.1)
    self.assertAlmostEqual(step.speedup(4, Network(1e15)), 0.8, places=6)

  def test_what_hides_behind_the_backward_pass_is_not_saved(self):
    """Full precision hides all it sends; one bit waits for the momentum."""
    step = Step(_SHAPES, compute_s=5.0, hidden_s=3.5)
    network = Network(1e6)
    self.assertEqual(step.full_s(4, network), 5.0)
    self.assertLess(step.speedup(4, network), 1)

  def test_a_run_with_steps_in_full_precision(self):
    """The paper's 1 / (w + (1 - w) / 16) if nothing is computed."""
    step = Step(_SHAPES, compute_s=1e-9)
    network = Network(1.0)
    gain = step.speedup(4, network)
    self.assertAlmostEqual(
      step.speedup(4, network, full_share=0.15), 1 / (0.15 + 0.85 / gain)
    )
    self.assertEqual(step.speedup(4, network, full_share=1.0), 1.0)

  def test_one_worker_sends_nothing(self):
    step = Step(_SHAPES, compute_s=1.0)
    self.assertEqual(step.speedup(1, Network(1.0)), 1.0)

  @parameterized.parameters(
    (lambda: Network(0.0), "bandwidth=0.0 must be positive"),
    (lambda: Network(1.0, -1.0), "latency_s=-1.0 must not be negative"),
    (lambda: Step(_SHAPES, 0.0), "compute_s=0.0 must be positive"),
    (lambda: Step(_SHAPES, 1.0, 2.0), "hidden_s=2.0 must be between 0 and"),
    (lambda: Step(_SHAPES, 1.0, coding_s=-1.0), "coding_s=-1.0 must not"),
    (
      lambda: Step(_SHAPES, 1.0).speedup(4, Network(1.0), full_share=2.0),
      "full_share=2.0 must be in",
    ),
  )
  def test_bad_values_are_refused(self, make, message):
    with self.assertRaisesRegex(ValueError, message):
      make()


if __name__ == "__main__":
  absltest.main()
