"""K-FAC's decompositions are shared among workers, as KAISA's are."""

import collections
import math
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import hardware
from bertjax.hardware import hlo
from bertjax.layers.linear import Linear
from bertjax.optim.preconditioning import sharing
from tests.optim.one_layer import curvature
from tests.optim.workers import INPUTS, OUTPUTS, batch, world

_LAYERS, _WORKERS = 8, 4


class _Block(nn.Module):
  @nn.compact
  def __call__(self, x, _):
    y = Linear(
      "be,ef->bf", (INPUTS,), ("norm", "norm"), name="mix",
      kernel_init=nn.initializers.normal(0.3),
    )(x)  # fmt: skip
    return x + jnp.tanh(y), None


class _Stack(nn.Module):
  """A scanned stack of square layers."""

  coefficients = {"squares": 1.0}
  independent_rows = True
  fresh = ()

  def weights(self, batch):
    return {"squares": jnp.sum(batch["weight"])}

  @nn.compact
  def __call__(self, batch, *, train):
    del train
    scanned = nn.scan(
      _Block,
      variable_axes={"params": 0, "probes": 0, "row_probes": 0},
      split_rngs={"params": True},
      length=_LAYERS,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    found, _ = scanned(name="layers")(batch["x"], None)
    squares = jnp.square(found[:, :OUTPUTS] - batch["y"]).sum(-1)
    return {"squares": (squares * batch["weight"]).sum()}, {}


class _Plain(nn.Module):
  """Layers that are no stack: a narrow one, and two alike with a bias."""

  coefficients = {"squares": 1.0}
  independent_rows = True
  fresh = ()

  def weights(self, batch):
    return {"squares": jnp.sum(batch["weight"])}

  @nn.compact
  def __call__(self, batch, *, train):
    del train
    init = nn.initializers.normal(0.3)
    x = batch["x"]
    for name in ("first", "second"):
      x += jnp.tanh(Linear(
        "be,ef->bf", (INPUTS,), ("norm", "norm"), name=name, kernel_init=init
      )(x))  # fmt: skip
    found = Linear(
      "be,ef->bf", (OUTPUTS,), ("norm", "norm"), name="third", use_bias=False,
      kernel_init=init,
    )(x)  # fmt: skip
    squares = jnp.square(found - batch["y"]).sum(-1)
    return {"squares": (squares * batch["weight"]).sum()}, {}


_STACK, _PLAIN = _Stack(), _Plain()


def _world(
  fraction, axes=(("data", _WORKERS),), form="eigen", objective=_STACK
):
  return world(
    objective=objective, name="sgd", learning_rate=0.02, axes=axes,
    precondition=(
      ("name", "kfac"), ("form", form), ("inverse_interval", 2),
      ("grad_worker_fraction", fraction),
    ),
  )  # fmt: skip


def _run(w):
  state, losses = w.run(w.init(), 0, 3, lambda step, rows: batch(0))
  return jax.device_get(state.params), losses


def _collectives(w):
  """Of directions, and of the branches in which refreshes are."""
  with jax.set_mesh(w.mesh):
    text = w.lower().compile().as_text()
  found = hardware.read_collectives(hlo.Module(text))
  return text, found


class SharingTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.alone = _run(_world(None, axes=(("data", 1),)))

  @parameterized.parameters(
    (1.0, (("data", 4),)),
    (0.0, (("data", 4),)),
    (0.5, (("data", 2), ("fsdp", 2))),
  )
  def test_sharing_changes_nothing(self, fraction, axes):
    params, losses = _run(_world(fraction, axes))
    np.testing.assert_allclose(losses, self.alone[1], rtol=2e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      params,
      self.alone[0],
    )

  @parameterized.parameters(
    (1.0, (("data", 4),), 1),
    (0.25, (("data", 4),), 4),
    (0.0, (("data", 2), ("fsdp", 2)), 4),
    (0.5, (("data", 2), ("fsdp", 2)), 2),
    (None, (("data", 2), ("fsdp", 2)), 2),
  )
  def test_memory_of_a_device(self, fraction, axes, parts):
    factors = curvature(_world(fraction, axes).abstract.opt_state).factors
    for leaf in jax.tree.leaves(factors):
      local = leaf.sharding.shard_shape(leaf.shape)
      self.assertEqual(local, (_LAYERS // parts, *leaf.shape[1:]))

  @parameterized.parameters(1.0, 0.0)
  def test_what_travels(self, fraction):
    """Each worker decomposes its layers; then one thing or the other moves."""
    text, found = _collectives(_world(fraction))
    width = INPUTS + 1
    own = _LAYERS // _WORKERS
    for side in (INPUTS, width):
      self.assertRegex(text, rf"f32\[{own},{side},{side}\][^\n]*syevd")
      self.assertNotRegex(text, rf"f32\[{_LAYERS},{side},{side}\][^\n]*syevd")
    gathered = [c for c in found if c.kind == "all-gather"]
    # What one worker puts in.
    always = sum(c.operand_bytes for c in gathered if not c.branch)
    refreshes = sum(c.operand_bytes for c in gathered if c.branch)
    directions = 4 * own * INPUTS * width
    decompositions = 4 * own * sum(d * d + d for d in (INPUTS, width))
    if fraction == 1.0:
      self.assertEqual((always, refreshes), (0, decompositions))
    else:
      self.assertEqual((always, refreshes), (directions, 0))

  @parameterized.product(
    sizes=[((3,),), ((4,),), ((5,),), ((), (8,), (3, 2), (4,))],
    width=[3, 4],
    fraction=[1.0, 0.0],
  )
  def test_any_number_of_layers_is_dealt_out(self, sizes, width, fraction):
    """In one batch, and as fairly as whole layers go."""
    two = (("data", 2), ("fsdp", 2))
    w = _world(1.0, axes=two if fraction == 0 else (("data", _WORKERS),))
    keys = jax.random.split(jax.random.key(0), len(sizes))
    stacks = [
      jax.random.normal(key, (*size, width, width + 2))
      for key, size in zip(keys, sizes, strict=True)
    ]
    stacks = [
      np.array(x @ jnp.swapaxes(x, -1, -2)) + np.eye(width, dtype=np.float32)
      for x in stacks
    ]

    @jax.jit
    def inverses(stacks):
      def inverse(x):
        shapes.append(x.shape)
        return jnp.linalg.inv(x)

      shapes.clear()  # Of more than one tracing.
      return sharing.decompose(inverse, stacks, fraction)

    shapes: list[tuple[int, ...]] = []
    with jax.set_mesh(w.mesh):
      found = inverses(stacks)
    for matrix, one in zip(stacks, found, strict=True):
      np.testing.assert_allclose(
        one, np.linalg.inv(matrix), rtol=1e-3, atol=1e-5
      )
    counts = [math.prod(size) for size in sizes]
    rest = sum(n for n in counts if n % _WORKERS)
    dealt = sum(n for n in counts if n % _WORKERS == 0) // _WORKERS
    share = dealt + -(-rest // _WORKERS)
    self.assertEqual(shapes[-1], (share, width, width))

  @parameterized.parameters(1.0, 0.0)
  def test_layers_of_no_stack_share_without_a_change(self, fraction):
    alone = _run(_world(None, (("data", 1),), objective=_PLAIN))
    params, losses = _run(_world(fraction, objective=_PLAIN))
    np.testing.assert_allclose(losses, alone[1], rtol=2e-5)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      params,
      alone[0],
    )

  def test_what_layers_of_no_stack_send_and_keep(self):
    """Those of one width together; rows are kept where they divide."""
    w = _world(0.0, objective=_PLAIN)
    text, found = _collectives(w)
    widths = {INPUTS: 3, INPUTS + 1: 2, OUTPUTS: 1}
    self.assertLen(re.findall(r"syevd_ffi", text), len(widths))
    sent = collections.Counter()
    for c in found:
      if len(c.branch) == 2:
        sent[c.kind] += c.operand_bytes
    # One matrix or none of each width is a worker's.
    square = {d: 4 * d * d for d in widths}
    in_rows = [d for d in widths if d % _WORKERS == 0]
    self.assertNotEmpty(in_rows)
    self.assertEqual(
      sent,
      {
        # There as rows of covariances, back as rows of eigenvectors.
        "all-to-all": sum(2 * square[d] for d in in_rows),
        # To all.
        "all-reduce": sum(4 * d * n for d, n in widths.items())
        + sum(square[d] * n for d, n in widths.items() if d not in in_rows),
      },
    )
    factors = curvature(w.abstract.opt_state).factors
    for leaf in jax.tree.leaves(factors):
      local = leaf.sharding.shard_shape(leaf.shape)
      parts = _WORKERS if leaf.ndim == 2 and leaf.shape[0] % 4 == 0 else 1
      self.assertEqual(local, (leaf.shape[0] // parts, *leaf.shape[1:]))

  @parameterized.parameters(
    ((16, 5, 5), (("data", "fsdp"),)),
    ((12, 5, 5), ("fsdp",)),  # by layers over four, as eight do not divide them
    ((12, 5), ("fsdp",)),
    ((6, 16, 16), ("data",)),
    ((5, 16, 16), (None, ("data", "fsdp"))),
    ((5, 12, 12), (None, "fsdp")),
    ((16, 16), (("data", "fsdp"),)),
    ((5, 17, 17), ()),
    ((16,), ()),
  )
  def test_as_many_workers_as_divide_a_factor_keep_it(self, shape, spec):
    mesh = dict(data=2, fsdp=4, model=3)
    self.assertEqual(tuple(sharing.place(shape, mesh, 0.0)), spec)

  def test_a_fraction_that_no_axes_make_is_refused(self):
    mesh = dict(data=2, fsdp=4, model=2)
    for fraction, axes in (
      (1.0, ()), (0.5, ("data",)), (0.25, ("fsdp",)), (0.125, ("data", "fsdp")),
      (0.0, ("data", "fsdp")), (None, ("fsdp",)),
    ):  # fmt: skip
      self.assertEqual(sharing.owner_axes(mesh, fraction), axes)
    with self.assertRaisesRegex(
      ValueError, "data=2, fsdp=4 .*1/1, 1/2, 1/4, 1"
    ):
      sharing.owner_axes(mesh, 0.3)


if __name__ == "__main__":
  absltest.main()
