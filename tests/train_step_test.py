"""Loss and parameters do not depend on how a batch is split over anything."""

import functools

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from bertjax import optim, train_state, train_step
from bertjax.models import bert
from bertjax.objectives import masked_lm
from bertjax.objectives.fine_tuning import multiple_choice
from bertjax.parallel.mesh import make_mesh
from bertjax.parallel.sharding import put_batch

_ROWS, _LENGTH, _MASKED, _VOCABULARY = 16, 24, 5, 64
_UNCLIPPED = {"clip_norm": 1e6}  # above every norm


def _batch():
  rng = np.random.default_rng(0)
  batch = dict(
    tokens=rng.integers(0, _VOCABULARY, (_ROWS, _LENGTH)),
    segment_ids=np.ones((_ROWS, _LENGTH)),
    masked_positions=rng.integers(0, _LENGTH, (_ROWS, _MASKED)),
    labels=rng.integers(0, _VOCABULARY, (_ROWS, _MASKED)),
    pair_labels=rng.integers(0, 2, _ROWS),
  )
  batch["labels"][:7, 2:] = -1  # rows, so microbatches too, weigh differently
  batch["pair_labels"][5:9] = -1
  batch["segment_ids"][3, 11:] = 0
  return {k: v.astype(np.int32) for k, v in batch.items()}


@functools.cache
def _run(
  num_devices=1,
  microbatches=1,
  dropout_rate=0.0,
  local=False,
  clip_norm=1.0,
  clip_scope="global",
  precondition=None,
  **axes,
):
  """Losses of three steps, and the parameters after them."""
  mesh = make_mesh(**axes, devices=jax.devices()[:num_devices])
  encoder = bert(
    vocab_size=_VOCABULARY,
    num_layers=2,
    emb_dim=16,
    num_heads=4,
    max_positions=32,
    dropout_rate=dropout_rate,
  )
  objective = masked_lm(encoder=encoder, pair_task="nsp")
  batch = _batch()
  spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
  params, names = train_state.abstract_params(objective, spec)
  options = dict(
    name="lamb",
    learning_rate=1e-2,
    clip_norm=clip_norm,
    clip_scope=clip_scope,
  )
  if precondition is not None:
    # Half precision would round sums in another order elsewhere.
    options["precondition"] = dict(
      name=precondition, interval=2, dtype="float32", wire_dtype="float32"
    )
  optimizer = optim.build_optimizer(
    options,
    total_steps=9,
    params=params,
    logical_axes=names,
    linear_layers=lambda: train_state.linear_layers(objective, spec),
  )
  if local:
    optimizer = _summing(optimizer)
  key = jax.random.key(0)
  _, shardings = train_state.state_shardings(
    objective, optimizer.transform, spec, mesh, key
  )
  make = functools.partial(
    train_state.init_state, objective, optimizer.transform, spec
  )
  step = train_step.compile_step(
    objective, optimizer, mesh, shardings, spec, microbatches
  )
  with jax.set_mesh(mesh):
    state = jax.jit(make, out_shardings=shardings)(key)
  losses = []
  for _ in range(3):
    state, metrics = step(state, put_batch(batch, mesh))
    losses.append(float(metrics["loss"][0]))
  return losses, jax.device_get(state.params), jax.device_get(metrics)


def _summing(optimizer):
  """The same optimizer, fed with local gradients that it sums itself."""

  def update(grads, state, params=None, **extra):
    grads = jax.tree.map(lambda g: jax.lax.psum(g, "data"), grads)
    return optimizer.transform.update(grads, state, params, **extra)

  transform = optim.LocalGradientTransformation(
    optimizer.transform.init, update
  )
  return optim.Optimizer(transform, optimizer.schedule, local_gradients=True)


class TrainStepTest(parameterized.TestCase):
  def _assert_same(self, a, b):
    # float32 sums in another order; LAMB's ratios keep errors relative.
    np.testing.assert_allclose(a[0], b[0], rtol=3e-6)
    jax.tree.map(
      lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), a[1], b[1]
    )

  @parameterized.named_parameters(
    ("mixed", dict(microbatches=2), dict(data=2, fsdp=2, model=2)),
    ("sequence", {}, dict(data=2, model=2, seq=2)),
  )
  def test_a_mesh_changes_nothing_dropout_included(self, parts, axes):
    options = dict(dropout_rate=0.1, **parts)
    self._assert_same(_run(**options), _run(**options, num_devices=8, **axes))

  @parameterized.named_parameters(
    ("data", dict(num_devices=8)),
    ("fsdp", dict(num_devices=8, data=1, fsdp=8)),
    ("tensor", dict(num_devices=4, data=1, model=4)),
  )
  @pytest.mark.slow
  def test_a_single_axis_changes_nothing_dropout_included(self, layout):
    # "mixed" has them all.
    self._assert_same(_run(dropout_rate=0.1), _run(dropout_rate=0.1, **layout))

  def test_accumulation_equals_the_big_batch(self):
    self._assert_same(_run(**_UNCLIPPED), _run(**_UNCLIPPED, microbatches=4))

  @pytest.mark.slow
  def test_a_split_sequence_changes_no_microbatch_dropout_included(self):
    # Either by itself is above.
    options = dict(dropout_rate=0.1, microbatches=2)
    self._assert_same(
      _run(**options), _run(**options, num_devices=4, data=2, seq=2)
    )

  def test_gradients_of_workers_add_up_to_those_of_one_device(self):
    options = dict(dropout_rate=0.1)
    self._assert_same(
      _run(**options), _run(**options, local=True, num_devices=4)
    )

  def test_a_mean_of_means_would_differ(self):
    """The batch is such that the two tests above could fail."""
    weight = (_batch()["labels"] >= 0).reshape(-1, 4, _MASKED).sum((0, 2))
    self.assertGreater(weight.max(), weight.min())

  # Devices and microbatches alone: `optim/preconditioned_step_test.py`; what a
  # scanned stack gives on shards: `layers/statistics_test.py`.
  @pytest.mark.slow
  def test_curvature_of_a_scanned_stack_is_the_same_everywhere(self):
    options = dict(_UNCLIPPED, precondition="mkor")
    one = _run(**options)
    self.assertEqual(one[2]["curvature_fallbacks"][0], 0)
    self.assertGreater(abs(one[0][2] - _run(**_UNCLIPPED)[0][2]), 1e-4)
    layout = dict(num_devices=8, data=2, fsdp=2, model=2)
    self._assert_same(one, _run(**options, microbatches=2, **layout))

  @parameterized.named_parameters(
    ("model", dict(num_devices=8, data=2, fsdp=2, model=2)),
    ("sequence", dict(microbatches=2, num_devices=4, data=2, seq=2)),
  )
  @pytest.mark.slow
  def test_curvature_is_the_same_on_other_layouts(self, layout):
    options = dict(_UNCLIPPED, precondition="mkor")
    self._assert_same(_run(**options), _run(**options, **layout))

  def test_clipping_per_shard_above_every_norm_is_none(self):
    whole = _run(**_UNCLIPPED)
    per_shard = _run(**_UNCLIPPED, clip_scope="per_shard", num_devices=4)
    self._assert_same(whole, per_shard)
    # The shards' own gradients are longer than their mean.
    self.assertGreater(per_shard[2]["grad_norm"][0], whole[2]["grad_norm"][0])

  def test_metrics_count_the_whole_batch(self):
    _, _, metrics = _run(
      dropout_rate=0.1, num_devices=8, data=2, model=2, seq=2
    )
    batch = _batch()
    count = (batch["labels"] >= 0).sum()
    self.assertEqual(metrics["mlm_accuracy"][1], count)
    self.assertEqual(metrics["tokens"][0], (batch["segment_ids"] > 0).sum())

  def test_dropout_differs_between_steps(self):
    losses, _, _ = _run(dropout_rate=0.1)
    self.assertLen(set(losses), 3)

  @parameterized.parameters(
    (dict(microbatches=3), "microbatches=3 does not divide data.batch_size=16"),
    (dict(microbatches=4, num_devices=8), "4 rows, which do not divide over 8"),
  )
  def test_a_batch_that_does_not_divide_is_refused(self, layout, message):
    with self.assertRaisesRegex(ValueError, message):
      _run(**layout)


class ChoicesTest(parameterized.TestCase):
  @parameterized.parameters(1, 2)
  def test_each_choice_is_a_sample_of_its_own(self, microbatches):
    examples, choices = 4, 3
    encoder = bert(vocab_size=_VOCABULARY, num_layers=1, emb_dim=8, num_heads=2)
    objective = multiple_choice(encoder=encoder)
    rows = jax.ShapeDtypeStruct((examples, choices, _LENGTH), np.int32)
    batch = {
      "tokens": rows,
      "segment_ids": rows,
      "labels": jax.ShapeDtypeStruct((examples,), np.int32),
    }
    params, names = train_state.abstract_params(objective, batch)
    optimizer = optim.build_optimizer(
      dict(
        name="sgd",
        learning_rate=0.1,
        precondition=dict(
          name="sngd", rank=examples * choices, skip_padding=True
        ),
      ),
      total_steps=9,
      params=params,
      logical_axes=names,
      linear_layers=lambda: train_state.linear_layers(objective, batch),
    )
    state = jax.eval_shape(
      lambda key: train_state.init_state(
        objective, optimizer.transform, batch, key
      ),
      jax.random.key(0),
    )
    step = train_step.train_step(objective, optimizer, microbatches)
    after, _ = jax.eval_shape(step, state, batch)
    self.assertEqual(after.params, state.params)


if __name__ == "__main__":
  absltest.main()
