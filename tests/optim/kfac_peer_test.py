"""K-FAC against DeepMind's kfac-jax: an MLP's direction, both from one batch.

kfac-jax 0.0.8 does not run on this version of JAX (`get_bind_params` returns
less than it expects), so what it said with that line mended is kept in `PEER`;
`peer` is how it was asked.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest

from bertjax.layers.linear import Linear
from tests.optim import workers
from tests.optim.workers import world

INPUTS, HIDDEN, OUTPUTS, DAMPING = 3, 2, 2, 0.05


class Mlp(nn.Module):
  """Two layers with biases; the squared error, averaged over rows."""

  coefficients = {"squares": 1.0}
  independent_rows = True
  fresh = ()

  def weights(self, batch):
    return {"squares": jnp.float32(batch["y"].shape[0])}

  @nn.compact
  def __call__(self, batch, *, train):
    del train
    hidden = batch["x"][:, :INPUTS]
    for name, width in (("first", HIDDEN), ("second", OUTPUTS)):
      hidden = jnp.tanh(hidden) if name == "second" else hidden
      hidden = Linear(
        "be,ef->bf",
        (width,),
        ("norm", "norm"),
        kernel_init=nn.initializers.normal(0.5),
        name=name,
      )(hidden)
    squares = jnp.square(hidden - batch["y"][:, :OUTPUTS])
    return {"squares": squares.sum()}, {}


_MLP = Mlp()


def parameters():
  """Fixed, whatever the initialisers do."""
  return {
    "first": {
      "kernel": np.array([[0.5, -0.3], [0.2, 0.8], [-0.6, 0.1]], np.float32),
      "bias": np.array([0.1, -0.2], np.float32),
    },
    "second": {
      "kernel": np.array([[0.7, -0.4], [0.3, 0.9]], np.float32),
      "bias": np.array([-0.1, 0.05], np.float32),
    },
  }


def peer():
  """kfac-jax's direction: damped products of its factors' eigenvalues.

  Its empirical Fisher matrix is that of the batch's mean gradient, a row's over
  the number of rows; so is the damping here, and the inverse is as much longer.
  """
  import kfac_jax

  rows = workers.batch()
  x, y = rows["x"][:, :INPUTS], rows["y"][:, :OUTPUTS]

  def loss(params, batch):
    x, y = batch
    first, second = params["first"], params["second"]

    def layer(x, kernel, bias):
      return kfac_jax.register_dense(x @ kernel + bias[None], x, kernel, bias)

    hidden = jnp.tanh(layer(x, first["kernel"], first["bias"]))
    found = layer(hidden, second["kernel"], second["bias"])
    kfac_jax.register_squared_error_loss(found, y, weight=1.0)
    return jnp.square(found - y).sum() / len(x)

  with jax.numpy_rank_promotion("allow"):
    params = jax.tree.map(jnp.asarray, parameters())
    estimator = kfac_jax.BlockDiagonalCurvature(loss, auto_register_tags=False)
    key = jax.random.key(0)
    state = estimator.init(
      key, (params, (x, y)), exact_powers_to_cache=None,
      approx_powers_to_cache=None,
    )  # fmt: skip
    state = estimator.update_curvature_matrix_estimate(
      state, 0.0, 1.0, 0.0, len(x), key, (params, (x, y)),
      estimation_mode="fisher_empirical",
    )  # fmt: skip
    found = estimator.multiply_inverse(
      state, jax.grad(loss)(params, (x, y)), DAMPING / len(x),
      exact_power=True, use_cached=False, pmap_axis_name=None,
    )  # fmt: skip
    return jax.tree.map(lambda v: v / len(x), found)


PEER = {
  "first": {
    "kernel": [
      [-0.39138660, -0.43453729],
      [0.53507572, -0.32639477],
      [-0.20841794, 0.17282353],
    ],
    "bias": [-0.27023032, -0.12062519],
  },
  "second": {
    "kernel": [[-0.19420695, -0.46254855], [0.33660343, -0.59622157]],
    "bias": [-0.17815857, -0.14592072],
  },
}


class KfacPeerTest(absltest.TestCase):
  def test_direction_of_an_mlp_is_kfac_jax_s(self):
    w = world(
      objective=_MLP, name="sgd", learning_rate=1.0, clip_norm=None,
      precondition=(("name", "kfac"), ("form", "eigen"), ("decay", 0.0),
                    ("damping", DAMPING), ("rescale", "none")),
    )  # fmt: skip
    state = w.init()
    placed = jax.tree.map(
      lambda new, old: jax.device_put(new, old.sharding),
      parameters(),
      state.params,
    )
    state, _ = w.run(state.replace(params=placed), 0, 1)
    found = jax.tree.map(lambda old, new: old - new, parameters(),
                         jax.device_get(state.params))  # fmt: skip
    # Differences of weights up to 1 in float32, eigenvectors of LAPACK.
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
      found,
      jax.tree.map(np.asarray, PEER, is_leaf=lambda x: isinstance(x, list)),
    )


if __name__ == "__main__":
  absltest.main()
