"""The average in one bit: its law, its bits, its bytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized
from jax.sharding import PartitionSpec as P

from bertjax import hardware
from bertjax.hardware import hlo
from bertjax.parallel import compressed, elastic, signs, wire
from bertjax.parallel.grids import LANES, Compression, grid_of, order_of
from bertjax.parallel.mesh import make_mesh
from tests.parallel import onebit_oracle

_cut_servers = jax.jit(elastic.cut_servers, static_argnums=1)
_joined_servers = jax.jit(elastic.joined_servers, static_argnums=1)
_pack_signs, _unpack_signs = map(
  jax.jit, (signs.pack_signs, signs.unpack_signs)
)

# No product of lengths is divisible by 2, 4 or 8; one scanned stack; a scalar.
_SHAPES, _STACKED = ((5, 7), (3, 2, 6), ()), (0, 1, 0)
_DEFAULT = Compression()
_GRANULARITIES = ("buffer", "chunk", "tensor", "layer", "shard", 5)


def _dyadic(rng, shape, bits=6):
  """Numbers whose sums float32 does not round."""
  return rng.integers(-(2**bits), 2**bits, shape).astype(np.float32) / 2**bits


@functools.cache
def _reduce(workers, compression, stacked=None):
  """(x, e, d), each a list of arrays with a leading axis of workers -> same."""
  mesh = make_mesh(devices=jax.devices()[:workers])

  def run(x, e, d):
    if not compression.error_feedback:
      e = d = None
    first = lambda t: None if t is None else [a[0] for a in t]  # noqa: E731
    found = compressed.compressed_all_reduce(
      first(x),
      first(e),
      first(d),
      axis="data",
      compression=compression,
      stacked=stacked,
    )
    return [[] if t is None else [a[None] for a in t] for t in found]

  return jax.jit(
    jax.shard_map(
      run, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
  )


def _reduced(workers, compression, inputs, stacked=None):
  """`_reduce` of inputs, in NumPy."""
  return jax.device_get(_reduce(workers, compression, stacked)(*inputs))


def _alone(x, worker, server, compression=_DEFAULT, **options):
  """One worker's average, as one program."""

  def run(*inputs):
    return compressed.compressed_all_reduce(
      *inputs, axis=None, compression=compression, **options
    )

  return jax.device_get(jax.jit(run)(x, worker, server))


def _inputs(workers, compression, shapes=_SHAPES, stacked=_STACKED, make=None):
  rng = np.random.default_rng(workers)
  make = make or (lambda shape: rng.normal(size=shape).astype(np.float32))
  grids = [grid_of(s, workers, compression, k) for s, k in zip(shapes, stacked)]
  x, e = ([make((workers, *s)) for s in shapes] for _ in range(2))
  d = []
  for shape, grid in zip(shapes, grids):
    wanted = (workers, *(1,) * len(shape), grid.rows, grid.piece)
    cut = _cut_servers(make(shape), wanted)
    d.append(np.asarray(cut).reshape(workers, grid.rows, grid.piece))
  return x, e, d


def _no_server_errors(workers, length):
  grid = grid_of((length,), workers, Compression())
  return np.zeros((workers, 1, grid.piece), np.float32)


def _joined(d, shape):
  wanted = (d.shape[0], *(1,) * len(shape), *d.shape[1:])
  return np.asarray(_joined_servers(d.reshape(wanted), shape))


class SignsTest(parameterized.TestCase):
  @parameterized.parameters(1, 31, 32, 33, 200)
  def test_packing_is_a_bit_per_sign_and_reversible(self, lines):
    positive = np.random.default_rng(lines).random((3, lines, 5)) > 0.5
    words = _pack_signs(positive)
    self.assertEqual(
      (words.dtype, words.shape), (np.uint32, (3, -(-lines // 32), 5))
    )
    unpacked = np.asarray(_unpack_signs(words))
    np.testing.assert_array_equal(unpacked[:, :lines], positive)
    self.assertFalse(unpacked[:, lines:].any())
    # No sign is written twice: as many bits are set as there are.
    self.assertEqual(np.bitwise_count(np.asarray(words)).sum(), positive.sum())

  def test_known_vector(self):
    x = np.float32([3.0, -1.0, 0.0, -4.0])
    mean, worker, server = _alone(
      [x], [np.zeros_like(x)], [_no_server_errors(1, 4)[0]]
    )
    # 8 / 4 = 2 for every sign, that of 0 being positive.
    np.testing.assert_array_equal(mean[0], [2, -2, 2, -2])
    np.testing.assert_array_equal(worker[0], [1, 1, -2, -2])
    self.assertFalse(server[0].any())

  def test_rms_of_a_known_vector(self):
    x = [np.float32([1.0, -1.0, 1.0, -5.0])]
    mean, _, _ = _alone(x, None, None, Compression("rms", "tensor", False))
    np.testing.assert_allclose(mean[0], np.sqrt(7) * np.array([1, -1, 1, -1]))

  @parameterized.parameters(
    (dict(scale="l2"), "scale='l2' is unknown; choose from l1, rms"),
    (dict(granularity="row"), "granularity='row' is unknown.*buffer"),
    (dict(granularity=0), "granularity=0: blocks have at least one"),
  )
  def test_bad_options_are_refused(self, options, message):
    with self.assertRaisesRegex(ValueError, message):
      Compression(**options)

  def test_errors_without_feedback_are_refused(self):
    with self.assertRaisesRegex(ValueError, "error_feedback=False: give both"):
      compressed.compressed_all_reduce(
        [jnp.ones(3)],
        [jnp.ones(3)],
        [jnp.ones((1, 3))],
        axis=None,
        compression=Compression(error_feedback=False),
      )


class AllReduceTest(parameterized.TestCase):
  @parameterized.parameters(
    # Every pair of (workers, granularity, scale).
    (workers, granularity, ("l1", "rms")[(i + j) % 2])
    for i, workers in enumerate((1, 2, 8))
    for j, granularity in enumerate(_GRANULARITIES)
  )
  def test_what_is_not_sent_stays(self, workers, granularity, scale):
    compression = Compression(scale, granularity)
    x, e, d = inputs = _inputs(workers, compression)
    mean, worker, server = _reduced(workers, compression, inputs, _STACKED)
    for i, shape in enumerate(_SHAPES):
      # Bit for bit the same on every worker.
      np.testing.assert_array_equal(mean[i], np.broadcast_to(
        mean[i][:1], mean[i].shape))  # fmt: skip
      before = (x[i] + e[i]).mean(0) + _joined(d[i], shape)
      after = mean[i][0] + worker[i].mean(0) + _joined(server[i], shape)
      np.testing.assert_allclose(after, before, atol=2e-6)  # float32

  def test_transmitted_and_left_are_the_sum_of_inputs_exactly(self):
    """Powers of two as scales: float32 rounds nothing on the way."""
    workers = 4
    compression = Compression(granularity="tensor")
    rng = np.random.default_rng(0)
    # |x| is the same everywhere, so that scales are powers of two.
    make = lambda shape: rng.choice([-0.5, 0.5], shape).astype(np.float32)  # noqa: E731
    shapes, stacked = ((8, 4),), (0,)
    x, e, d = _inputs(workers, compression, shapes, stacked, make)
    e, d = [0 * e[0]], [0 * d[0]]
    total, sent = 0, 0
    for step in range(6):
      mean, e, d = _reduced(workers, compression, (x, e, d))
      total += x[0].mean(0)
      sent += mean[0][0]
      left = e[0].mean(0) + _joined(d[0], (8, 4))
      if step == 0:
        np.testing.assert_array_equal(sent + left, total)
    # A tenth of a unit in the last place of the largest sum, per step.
    np.testing.assert_allclose(sent + left, total, atol=1e-6)

  @parameterized.parameters(2, 4, 8)
  def test_equals_the_loop_over_workers_bit_for_bit(self, workers):
    """Scales here are exact sums over powers of two of numbers."""
    rng = np.random.default_rng(1)
    length = LANES * workers  # no padding
    x = _dyadic(rng, (workers, length), bits=4)
    e = _dyadic(rng, (workers, length), bits=4)
    d = _dyadic(rng, (workers, length // workers), bits=4)
    mean, worker, server = _reduced(
      workers, Compression(), ([x], [e], [d[:, None]])
    )
    expected = onebit_oracle.all_reduce(x, e, d)
    np.testing.assert_array_equal(mean[0][0], expected[0].astype(np.float32))
    np.testing.assert_array_equal(worker[0], expected[1].astype(np.float32))
    np.testing.assert_array_equal(
      server[0][:, 0], expected[2].astype(np.float32)
    )

  @parameterized.named_parameters(
    ("rows", (64, 128), (0, 1)), ("inner_axis", (128, 8, 8), (1, 2, 0))
  )
  def test_a_matrix_packed_alone_equals_the_loop(self, shape, order):
    rng, workers = np.random.default_rng(5), 2
    x, e = (_dyadic(rng, (workers, *shape), bits=4) for _ in range(2))
    grid = grid_of(shape, workers, Compression())
    self.assertTrue(grid.alone)
    d = _dyadic(rng, (workers, 1, grid.piece), bits=4)
    mean, worker, server = _reduced(workers, Compression(), ([x], [e], [d]))

    def flat(x):
      axes = (0, *(1 + axis for axis in order))
      return x.transpose(axes).reshape(len(x), -1)

    expected = onebit_oracle.all_reduce(flat(x), flat(e), d[:, 0])
    found = flat(mean[0])[0], flat(worker[0]), server[0][:, 0]
    for one, other in zip(found, expected):
      # A server's sum of 4,096 numbers rounds; a sign out of place is 0.1.
      np.testing.assert_allclose(one, other, atol=1e-6)

  @parameterized.product(
    granularity=_GRANULARITIES,
    workers=(2, 3),
  )
  def test_what_is_not_sent_of_matrices_stays(self, granularity, workers):
    """Padded or not, the first axis last or not, beside small tensors."""
    compression = Compression(granularity=granularity)
    shapes = ((190, 128), (2, 256, 12, 8), (7,), (128, 6))
    stacked = (0, 1, 0, 0)
    x, e, d = inputs = _inputs(workers, compression, shapes, stacked)
    mean, worker, server = _reduced(workers, compression, inputs, stacked)
    for i, shape in enumerate(shapes):
      before = (x[i] + e[i]).mean(0) + _joined(d[i], shape)
      after = mean[i][0] + worker[i].mean(0) + _joined(server[i], shape)
      np.testing.assert_allclose(after, before, atol=3e-6)  # float32

  def test_order_of_workers_does_not_matter(self):
    rng = np.random.default_rng(2)
    x, zero = _dyadic(rng, (4, 64)), np.zeros((4, 64), np.float32)
    d = [_no_server_errors(4, 64)]
    one, _, _ = _reduced(4, Compression(), ([x], [zero], d))
    other, _, _ = _reduced(4, Compression(), ([x[[2, 0, 3, 1]]], [zero], d))
    np.testing.assert_array_equal(one[0], other[0])

  def test_identical_workers_send_what_one_sends(self):
    rng = np.random.default_rng(3)
    row = _dyadic(rng, (1, 64))
    zero = np.zeros_like(row)
    d = [_no_server_errors(1, 64)]
    alone, error, _ = _reduced(1, Compression(), ([row], [zero], d))
    x = np.repeat(row, 4, 0)
    mean, errors, _ = _reduced(
      4, Compression(), ([x], [0 * x], [_no_server_errors(4, 64)])
    )
    np.testing.assert_array_equal(mean[0][0], alone[0][0])
    np.testing.assert_array_equal(errors[0], np.repeat(error[0], 4, 0))

  def test_zeros_stay_zeros(self):
    x = np.zeros((2, 9), np.float32)
    mean, e, d = _reduced(
      2, Compression(), ([x], [x], [_no_server_errors(2, 9)])
    )
    for found in (mean, e, d):
      self.assertFalse(np.any(found[0]))

  def test_masked_numbers_are_zero_and_touch_no_scale(self):
    x = np.float32([4.0, 100.0, -2.0, 7.0])
    mask = np.array([True, False, True, False])
    old = [np.float32([0.0, 3.0, 0.0, 0.0])], [np.ones((1, LANES), np.float32)]
    mean, worker, server = _alone([x], *old, masks=[mask])
    # Scale 3; the server adds 1: 4 and -2, scale 3.
    np.testing.assert_array_equal(mean[0], [3, 0, -3, 0])
    np.testing.assert_array_equal(worker[0], [1, 0, 1, 0])
    np.testing.assert_array_equal(server[0][0, :4], [1, 0, 1, 0])
    self.assertFalse(server[0][0, 4:].any())  # padding has no error

  @parameterized.parameters(("tensor",), ("layer",))
  def test_scales_are_of_their_own_tensor(self, granularity):
    """A tensor of a thousandth of the magnitude keeps it."""
    compression = Compression(granularity=granularity, error_feedback=False)
    x = np.ones((2, 2, 3), np.float32) * np.array([[1.0], [1e-3]], np.float32)
    stacked = (1,) if granularity == "layer" else (0, 0)
    tensors = [x] if granularity == "layer" else [x[:, 0], x[:, 1]]
    mean, _, _ = _reduced(2, compression, (tensors, [], []), stacked)
    found = mean[0][0] if granularity == "layer" else [m[0] for m in mean]
    np.testing.assert_allclose(found, x[0], rtol=1e-6)

  def test_chunks_have_their_own_scales(self):
    """Ones that one server averages, fives that the other does."""
    compression = Compression(granularity="chunk", error_feedback=False)
    x = np.repeat(np.float32([1, 5]), LANES) * np.ones((2, 1), np.float32)
    mean, _, _ = _reduced(2, compression, ([x], [], []))
    np.testing.assert_allclose(mean[0], x, rtol=1e-6)

  @parameterized.parameters(("tensor", 3.0), ("shard", None))
  def test_shards_share_a_scale_or_have_their_own(self, granularity, shared):
    """Halves of ones and of fives on two devices of each worker."""
    compression = Compression(granularity=granularity, error_feedback=False)
    mesh = make_mesh(data=2, model=2, devices=jax.devices()[:4])
    x = np.repeat(np.array([1.0, 5.0], np.float32), 4)

    def run(x):
      mean, _, _ = compressed.compressed_all_reduce(
        [x], None, None, axis="data", compression=compression,
        sum_axes=[("model",)],
      )  # fmt: skip
      return mean[0]

    found = jax.jit(
      jax.shard_map(
        run, mesh=mesh, in_specs=P("model"), out_specs=P("model"),
        check_vma=False,
      )
    )(x)  # fmt: skip
    expected = x if shared is None else np.full(8, shared)
    np.testing.assert_allclose(found, expected, rtol=1e-6)

  def test_what_pads_a_block_touches_no_scale(self):
    # Seven numbers in blocks of at most three: three, three, one.
    x = np.float32([1.0, -1.0, 1.0, 2.0, 2.0, -2.0, 5.0])
    compression = Compression(granularity=3, error_feedback=False)
    mean, _, _ = _alone([x], None, None, compression)
    np.testing.assert_array_equal(mean[0], x)

  def test_what_is_owed_stays_bounded_over_1000_averages(self):
    """Without feedback it grows with every one of them."""
    x = np.random.default_rng(4).normal(size=(4, 40)).astype(np.float32)
    owed = {}
    for feedback in (True, False):
      reduce = _reduce(4, Compression(error_feedback=feedback))

      def average(errors, _, reduce=reduce):
        mean, *errors = reduce([x], *errors)
        return errors, mean[0][0]

      errors = [[0 * x], [_no_server_errors(4, 40)]] if feedback else [[], []]
      means = jax.jit(lambda e: jax.lax.scan(average, e, length=1000)[1])(
        errors
      )
      sent = np.cumsum(np.asarray(means, np.float64), 0)
      gaps = np.abs(sent - np.arange(1, 1001)[:, None] * x.mean(0)).max(1)
      owed[feedback] = max(gaps[:100]), max(gaps[100:])
    # float32 rounds each error to 1e-7 of it.
    self.assertLess(owed[True][1], 1.5 * owed[True][0])
    self.assertGreater(owed[False][1], 9 * owed[False][0])

  @parameterized.parameters("buffer", "tensor", "layer", "shard", 8)
  def test_bytes_of_the_compiled_program_are_the_formula(self, granularity):
    workers, compression = 8, Compression(granularity=granularity)
    shapes = ((30, 41), (3, 70, 5), (9,))
    inputs = _inputs(workers, compression, shapes)
    program = _reduce(workers, compression, _STACKED).lower(*inputs).compile()
    module = hlo.Module(program.as_text())
    collectives = hardware.read_collectives(module)
    self.assertEqual(
      [c.kind for c in collectives], ["all-to-all", "all-gather"]
    )
    sent = sum(c.sent_bytes for c in collectives)
    self.assertEqual(
      sent, wire.compressed_bytes(shapes, workers, compression, _STACKED)
    )

  def test_matrices_are_sent_in_whole_words_of_rows(self):
    workers, shapes = 4, ((250, 256), (128, 40, 16), (5, 128), (9,))
    inputs = _inputs(workers, Compression(), shapes, (0, 0, 0, 0))
    program = _reduce(workers, Compression()).lower(*inputs).compile()
    collectives = hardware.read_collectives(hlo.Module(program.as_text()))
    sent = sum(c.sent_bytes for c in collectives)
    self.assertEqual(sent, wire.compressed_bytes(shapes, workers))
    # 64 rows of 256, 160 of 128; a line for the last two, a line of scales.
    lines = 64 * 2 // 32 + 160 // 32 + 1 + 1
    self.assertEqual(sent, 2 * (workers - 1) * lines * 128 * 4)

  def test_the_formula_approaches_a_bit_each_way(self):
    numbers, workers = 336_000_000, 64
    sent = wire.compressed_bytes([(numbers,)], workers)
    # Whole registers of words: 256 lines in 41,000 at most.
    self.assertAlmostEqual(sent / (63 / 64 * numbers / 4), 1, delta=7e-3)
    self.assertAlmostEqual(sent / 82.7e6, 1, delta=7e-3)  # the paper's size
    ring = wire.ring_bytes([(numbers,)], workers)
    self.assertAlmostEqual(ring / sent, 16, delta=0.1)
    self.assertAlmostEqual(ring / 1.323e9, 1, delta=1e-3)


class OrderTest(parameterized.TestCase):
  @parameterized.parameters(
    ((24, 1024, 4096), 1, (0, 1, 2)),
    ((24, 1024, 16, 64), 1, (0, 2, 3, 1)),  # queries: heads of 64
    ((24, 16, 64), 1, (0, 1, 2)),
    ((256, 384, 5), 1, (0, 2, 1)),
    ((384, 128, 5), 384, (0, 2, 1)),  # layers stay in front
    ((384, 7), 384, (0, 1)),
    ((), 1, ()),
  )
  def test_lanes_are_filled(self, shape, rows, expected):
    self.assertEqual(order_of(shape, rows), expected)

  @parameterized.parameters("buffer", "layer", 7)
  def test_servers_errors_are_counted_as_tensors_are(self, granularity):
    shape, workers = (2, 128, 24, 4), 3
    compression = Compression(granularity=granularity)
    whole = np.random.default_rng(6).normal(size=shape).astype(np.float32)
    grid = grid_of(shape, workers, compression, 1)
    wanted = (workers, 1, 1, 1, 1, grid.rows, grid.piece)
    cut = _cut_servers(whole, wanted)
    split = jax.jit(lambda x: grid.split(x, workers))(whole)
    np.testing.assert_array_equal(cut, split.reshape(wanted))
    np.testing.assert_array_equal(_joined_servers(cut, shape), whole)


class ElasticTest(parameterized.TestCase):
  @parameterized.parameters(
    # Every pair of (shards, rows, new).
    (shards, (1, 3)[(i + j) % 2], new)
    for i, shards in enumerate(((1, 1, 1), (1, 2, 3), (1, 4, 1)))
    for j, new in enumerate((1, 2, 5))
  )
  def test_servers_errors_are_the_same_however_cut(self, shards, rows, new):
    whole = np.random.default_rng(0).normal(size=(3, 4, 6)).astype(np.float32)

    def cut(workers, shards, rows):
      local = whole.size // int(np.prod(shards)) // rows
      piece = -(-local // workers)
      return _cut_servers(whole, (workers, *shards, rows, piece))

    old = cut(4, shards, rows)
    np.testing.assert_array_equal(_joined_servers(old, whole.shape), whole)
    again = _cut_servers(
      _joined_servers(old, whole.shape), cut(new, (1, 2, 1), 3).shape
    )
    np.testing.assert_array_equal(again, cut(new, (1, 2, 1), 3))

  def test_workers_errors_keep_their_mean(self):
    old = jnp.asarray(_dyadic(np.random.default_rng(1), (4, 3, 5)))
    for workers in (2, 8):
      new = elastic.recut_workers(old, workers)
      self.assertEqual(new.shape, (workers, 3, 5))
      np.testing.assert_array_equal(new.mean(0), old.mean(0))
    np.testing.assert_array_equal(elastic.recut_workers(old, 4), old)


if __name__ == "__main__":
  absltest.main()
