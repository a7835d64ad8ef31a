"""Statistics of layers are those of inputs and gradients written out."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import accumulation, train_state
from bertjax.layers import statistics
from bertjax.layers.linear import Linear
from bertjax.models import bert
from bertjax.models.encoder import unstack_layers
from bertjax.objectives import masked_lm
from bertjax.objectives.base import total_loss
from bertjax.objectives.fine_tuning import multiple_choice
from bertjax.optim.preconditioning.layers import find_layers
from bertjax.parallel.mesh import make_mesh
from bertjax.parallel.sharding import put_batch
from tests import jitted
from tests.draws import normal

_ROWS, _LENGTH, _MASKED, _VOCABULARY, _LAYERS = 8, 12, 3, 32, 2
_PADDED = 5  # tokens of the one row that has padding


def _batch():
  rng = np.random.default_rng(0)
  batch = dict(
    tokens=rng.integers(0, _VOCABULARY, (_ROWS, _LENGTH)),
    segment_ids=np.ones((_ROWS, _LENGTH)),
    masked_positions=rng.integers(0, _LENGTH, (_ROWS, _MASKED)),
    labels=rng.integers(0, _VOCABULARY, (_ROWS, _MASKED)),
    pair_labels=rng.integers(0, 2, _ROWS),
  )
  batch["labels"][:3, 1:] = -1  # microbatches weigh differently
  batch["segment_ids"][2, _LENGTH - _PADDED :] = 0
  return jax.device_put({k: v.astype(np.int32) for k, v in batch.items()})


@functools.cache
def _objective(scan=True, remat="none", dtype=jnp.float32):
  encoder = bert(
    vocab_size=_VOCABULARY,
    num_layers=_LAYERS,
    emb_dim=16,
    num_heads=2,
    mlp_dim=20,
    max_positions=16,
    scan=scan,
    remat=remat,
    dropout_rate=0.0,
    attend="reference",
    dtype=dtype,
  )
  return masked_lm(encoder=encoder, pair_task="nsp")


def _spec(batch):
  return {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}


@functools.cache
def _params():
  @jax.jit
  def init(key, batch):
    variables = _objective().init({"params": key}, batch, train=False)
    return nn.meta.unbox(variables["params"])

  rng = np.random.default_rng(1)
  shaken = jax.tree.map(
    lambda x: x + 0.1 * rng.normal(size=x.shape).astype(np.float32),
    jax.device_get(init(jax.random.key(0), _batch())),
  )
  return jax.device_put(shaken)


def _loss(objective, variables, batch, weights):
  sums, _ = objective.apply(variables, batch, train=True)
  return total_loss(sums, weights, objective.coefficients)


@functools.cache
def _layers():
  summed = train_state.linear_layers(_objective(), _spec(_batch()))
  return find_layers(
    _params(), lambda name, leaf: (0,) if "/layers/" in name else (), summed
  )


def _wanted(**options):
  return statistics.Wanted(
    layers={layer.path: layer.size for layer in _layers()},
    names={layer.path: statistics.NAMES for layer in _layers()},
    **options,
  )


@functools.cache
def _found(
  microbatches=1, num_devices=1, remat="none", groups=1, skip_padding=False
):
  """Statistics through the accumulation of the train step."""
  objective, batch = _objective(remat=remat), _batch()
  wanted = _wanted(groups=groups, skip_padding=skip_padding)
  weights = objective.weights(batch)

  def loss_fn(variables, extra, batch, key):
    del key
    with statistics.capture(wanted, batch):
      loss = _loss(objective, variables, batch, weights)
    return loss, ({}, extra)

  @jax.jit
  def run(params, batch):
    variables = {"params": params} | wanted.probes(_ROWS // microbatches)
    _, grads, _, _ = accumulation.accumulate(
      loss_fn, variables, {}, batch, jax.random.key(0), microbatches
    )
    return wanted.collect(grads)

  mesh = make_mesh(devices=jax.devices()[:num_devices])
  with jax.set_mesh(mesh):
    return jax.device_get(run(_params(), put_batch(batch, mesh)))


@functools.cache
def _written_out():
  """Inputs x and gradients g [b, t, d] of each layer, by unscanned path."""
  objective, batch = _objective(scan=False), _batch()
  params = unstack_layers(_params(), _LAYERS)
  weights = objective.weights(batch)

  def run(shifts):
    inputs, specs = {}, {}

    def shifted(call, args, kwargs, context):
      y = call(*args, **kwargs)
      if isinstance(context.module, Linear):
        path = "/".join(context.module.path)
        inputs[path], specs[path] = args[0], context.module.spec
        y += shifts.get(path, jnp.zeros_like(y))
        shapes[path] = y
      return y

    with nn.intercept_methods(shifted):
      loss = _loss(objective, {"params": params}, batch, weights)
    return loss, inputs

  shapes = {}
  jax.eval_shape(run, {})
  zeros = {path: jnp.zeros(y.shape) for path, y in shapes.items()}
  slopes, inputs = jax.jit(jax.grad(run, has_aux=True))(zeros)

  def flat(v, path):
    return np.asarray(v).reshape(_ROWS, -1, _width(v, path))

  def _width(v, path):
    # "bte,ehd->bthd" and "bthd,hde->bte"; the pooled row is "be".
    kept = 1 if "pool" in path or "pair" in path else 2
    return int(np.prod(v.shape[kept:]))

  return {
    path: (flat(inputs[path], path), flat(slopes[path], path))
    for path in inputs
  }


def _expected(path, statistic):
  """`statistic(x, g)`, for a stacked layer of each of its layers."""
  names = [path]
  if "/layers/" in path:
    names = [path.replace("layers", f"layers_{i}") for i in range(_LAYERS)]
  values = [statistic(*_written_out()[name]) for name in names]
  return values[0] if len(values) == 1 else np.stack(values)


def _sum(x):
  return x.reshape(-1, x.shape[-1]).sum(0)


def _gram(x):
  x = x.reshape(-1, x.shape[-1])
  return x.T @ x


_BY_NAME = {
  "token_count": lambda x, g: x.shape[0] * x.shape[1],
  "input_sum": lambda x, g: _sum(x),
  "output_sum": lambda x, g: _sum(g),
  "input_square": lambda x, g: (x * x).sum(),
  "input_gram": lambda x, g: _gram(x),
  "output_gram": lambda x, g: _gram(g),
}


# One program for what must change nothing.
_EVERYTHING = dict(microbatches=4, num_devices=2, remat="full")


class StatisticsTest(parameterized.TestCase):
  @parameterized.named_parameters(
    ("plain", dict()),
    ("devices", dict(num_devices=4)),
    ("microbatches_on_devices_with_remat", _EVERYTHING),
  )
  def test_sums_are_those_of_the_whole_batch(self, options):
    found = _found(**options)
    paths = {layer.path for layer in _layers()}
    self.assertEqual(set(found), paths)
    self.assertIn("encoder/layers/attention/output", paths)
    for path in paths:
      depth = 1 if "/layers/" in path else 0
      for name, statistic in _BY_NAME.items():
        value = found[path][name].sum(depth)
        if name in ("token_count", "input_sum", "output_sum", "input_square"):
          value = value.sum(depth)  # the one group
        expected = _expected(path, statistic)
        np.testing.assert_allclose(
          value, expected, rtol=2e-5, atol=2e-6, err_msg=f"{path} {name}"
        )

  def test_each_shard_has_its_own(self):
    whole, shards = _found(), _found(num_devices=4)
    path = "mlm_head/transform"
    value = shards[path]["input_sum"]
    self.assertEqual(value.shape, (4, 1, 16))
    x, _ = _written_out()[path]
    np.testing.assert_allclose(
      value[:, 0], x.reshape(4, -1, 16).sum(1), rtol=1e-5, atol=1e-6
    )
    self.assertEqual(whole[path]["input_sum"].shape, (1, 1, 16))
    # Of a scanned stack too, layer by layer.
    path = "encoder/layers/mlp/up"
    value = shards[path]["input_sum"]
    self.assertEqual(value.shape, (_LAYERS, 4, 1, 16))
    expected = _expected(path, lambda x, _: x.reshape(4, -1, 16).sum(1))
    np.testing.assert_allclose(value[:, :, 0], expected, rtol=1e-5, atol=1e-6)

  @parameterized.parameters(dict(), _EVERYTHING)
  def test_rows_are_the_batch_s_in_any_order(self, **options):
    for path in ("pooler/dense", "encoder/layers/mlp/up"):
      found = _found(**options)[path]
      expected = (
        _expected(path, lambda x, g: x.mean(1)),
        _expected(path, lambda x, g: g.sum(1)),
      )
      names = "input_rows", "output_rows"
      # Samples may be permuted, but both alike.
      joined = np.concatenate([found[name] for name in names], -1)
      wanted = np.concatenate(expected, -1)
      order = [
        np.argmin(np.abs(joined - row[..., None, :]).sum(-1), -1)
        for row in np.moveaxis(wanted, -2, 0)
      ]
      order = np.stack(order, -1)
      self.assertTrue((np.sort(order) == np.arange(_ROWS)).all())
      np.testing.assert_allclose(
        np.take_along_axis(joined, order[..., None], -2),
        wanted,
        rtol=1e-5,
        atol=1e-6,
      )

  def test_groups_divide_the_tokens(self):
    path = "encoder/layers/mlp/down"
    found, whole = _found(groups=4)[path], _found()[path]
    self.assertEqual(found["output_sum"].shape, (_LAYERS, 1, 4, 16))
    for name in ("input_sum", "output_sum", "token_count"):
      np.testing.assert_allclose(
        found[name].sum(2), whole[name].sum(2), rtol=1e-5, atol=1e-6
      )
    expected = _expected(
      path, lambda x, g: x.reshape(4, -1, x.shape[-1]).sum(1)
    )
    np.testing.assert_allclose(
      found["input_sum"][:, 0], expected, rtol=1e-5, atol=1e-5
    )

  def test_padding_is_left_out_where_rows_are_whole(self):
    found = _found(skip_padding=True, microbatches=2)
    path = "encoder/layers/mlp/up"
    padding = np.array(_batch()["segment_ids"]) == 0
    self.assertEqual(padding.sum(), _PADDED)
    np.testing.assert_array_equal(
      found[path]["token_count"].sum((1, 2)), _ROWS * _LENGTH - _PADDED
    )
    expected = _expected(path, lambda x, g: x[~padding].sum(0))
    np.testing.assert_allclose(
      found[path]["input_sum"].sum((1, 2)), expected, rtol=1e-5, atol=1e-5
    )
    # Of masked positions nobody knows what is padding.
    head = found["mlm_head/transform"]["token_count"].sum()
    self.assertEqual(head, _ROWS * _MASKED)

  def test_choices_are_rows(self):
    rows, choices = 2, 4
    objective = multiple_choice(encoder=_objective().encoder, dropout_rate=0.0)
    batch = {
      key: _batch()[key].reshape(rows, choices, _LENGTH)
      for key in ("tokens", "segment_ids")
    } | {"labels": jnp.array([1, 3])}
    params = nn.meta.unbox(
      jitted.init(objective, jax.random.key(0), batch, train=False)["params"]
    )
    layers = find_layers(
      params,
      lambda name, leaf: (0,) if "/layers/" in name else (),
      train_state.linear_layers(objective, _spec(batch)),
    )
    wanted = statistics.Wanted(
      {layer.path: layer.size for layer in layers},
      {layer.path: statistics.NAMES for layer in layers},
      skip_padding=True,
    )
    self.assertEqual(statistics.rows_of(batch), rows * choices)

    @jax.jit
    def run(params):
      def loss(variables):
        with statistics.capture(wanted, batch):
          return _loss(objective, variables, batch, objective.weights(batch))

      probes = wanted.probes(statistics.rows_of(batch))
      grads = jax.grad(loss)({"params": params} | probes)
      return grads["params"], wanted.collect(grads)

    grads, found = jax.device_get(run(params))
    up = found["encoder/layers/mlp/up"]
    real = (np.array(batch["segment_ids"]) > 0).sum()
    np.testing.assert_array_equal(up["token_count"].sum((1, 2)), real)
    self.assertEqual(up["input_rows"].shape, (_LAYERS, rows * choices, 16))
    # The kernel's gradient has no other rows: one token each.
    classifier = found["classifier"]
    np.testing.assert_allclose(
      classifier["input_rows"].T @ classifier["output_rows"],
      grads["classifier"]["kernel"],
      atol=1e-6,
    )

  def test_the_bias_gradient_is_the_output_sum(self):
    wanted = _wanted()
    path = "encoder/layers/attention/query"
    names = {path: ("token_count", "input_sum")}
    wanted = statistics.Wanted(wanted.layers, names)
    grads = jax.tree.map(
      lambda x: np.arange(x.size, dtype=x.dtype).reshape(x.shape), _params()
    )
    found = wanted.collect({"params": jax.device_put(grads)})[path][
      "output_sum"
    ]
    np.testing.assert_array_equal(found, np.arange(2 * 16).reshape(2, 1, 1, 16))

  def test_another_order_of_axes_and_no_bias(self):
    class Layers(nn.Module):
      @nn.compact
      def __call__(self, x):
        y = Linear("bte,ehd->bhdt", (2, 3), (None,) * 3, use_bias=False,
                   name="first")(x)  # fmt: skip
        return Linear("bhdt,hde->bte", (4,), (None,) * 3, use_bias=False,
                      name="second")(y)  # fmt: skip

    x, slope = normal(0, 2, 7, 5), normal(1, 2, 7, 4)
    model = Layers()
    params = nn.meta.unbox(jitted.init(model, jax.random.key(2), x)["params"])
    summed = statistics.linear_layers(lambda: model.init(jax.random.key(2), x))
    self.assertEqual(summed, {"first": 1, "second": 2})
    layers = find_layers(params, lambda name, leaf: (), summed)
    wanted = statistics.Wanted(
      {layer.path: layer.size for layer in layers},
      {layer.path: ("input_sum", "output_sum") for layer in layers},
    )

    @jax.jit
    def collected(params):
      def loss(variables):
        with statistics.capture(wanted, {}):
          return jnp.sum(slope * model.apply(variables, x))

      return wanted.collect(
        jax.grad(loss)({"params": params} | wanted.probes(2))
      )

    found, params = jax.device_get((collected(params), params))
    x, slope = np.array(x), np.array(slope)
    first, second = params["first"]["kernel"], params["second"]["kernel"]
    y = np.einsum("bte,ehd->hd", x, first)
    back = np.einsum("bte,hde->hd", slope, second)
    for path, name, expected in (
      ("first", "input_sum", x.sum((0, 1))),
      ("first", "output_sum", back),
      ("second", "input_sum", y),
      ("second", "output_sum", slope.sum((0, 1))),
    ):
      np.testing.assert_allclose(
        found[path][name].reshape(-1), np.ravel(expected), rtol=1e-4, atol=1e-5
      )

  def test_a_convolution_is_linear_in_its_patches(self):
    """As K-FAC sees one: every place is a token, its patch the input."""
    images, kernel = normal(0, 2, 5, 7, 3), normal(1, 3, 2, 3, 4)
    slope = normal(2, 2, 3, 6, 4)
    axes = ("NHWC", "HWIO", "NHWC")
    layer = Linear("bhwp,po->bhwo", (4,), (None,) * 2, name="filters")
    wanted = statistics.Wanted(
      {"filters": statistics.LayerSize((), 18, 4)},
      {"filters": ("token_count", "input_sum", "input_gram", "output_gram")},
    )

    class Convolution(nn.Module):
      @nn.compact
      def __call__(self, x):
        patches = jax.lax.conv_general_dilated_patches(
          x, (3, 2), (1, 1), "VALID", dimension_numbers=axes
        )
        return layer.clone(parent=self, name="filters")(patches)

    # Patches list a channel's places together.
    flat = np.array(kernel).transpose(2, 0, 1, 3).reshape(18, 4)
    params = {"filters": {"kernel": flat, "bias": np.zeros(4, np.float32)}}
    model = Convolution()

    @jax.jit
    def run(params):
      def loss(variables):
        with statistics.capture(wanted, {}):
          y = model.apply(variables, images)
        return jnp.sum(slope * y), y

      grads, y = jax.grad(loss, has_aux=True)(
        {"params": params} | wanted.probes(2)
      )
      return wanted.collect(grads)["filters"], y

    found, y = run(params)
    expected = jax.lax.conv_general_dilated(
      images, kernel, (1, 1), "VALID", dimension_numbers=axes
    )
    np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
    windows = np.lib.stride_tricks.sliding_window_view(images, (3, 2), (1, 2))
    windows = windows.reshape(-1, 18)
    self.assertEqual(np.sum(found["token_count"]), 2 * 3 * 6)
    for name, value in (
      ("input_sum", windows.sum(0)),
      ("input_gram", windows.T @ windows),
      ("output_gram", _gram(np.asarray(slope))),
      ("output_sum", np.asarray(slope).sum((0, 1, 2))),
    ):
      np.testing.assert_allclose(
        np.squeeze(found[name]), value, rtol=1e-4, atol=1e-4, err_msg=name
      )

  def test_groups_that_do_not_divide_are_refused(self):
    with self.assertRaisesRegex(ValueError, "8 tokens .* into 5 groups"):
      _found(groups=5)


if __name__ == "__main__":
  absltest.main()
