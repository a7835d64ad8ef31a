"""One vector a text."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Int

from bertjax.loading import LoadedModel
from bertjax.predict import rows as rows_lib
from bertjax.registry import lookup

# Pooling of hidden states over the tokens where `valid` is 1.


def pool_cls(
  hidden: Float[Array, "b t e"], valid: Int[Array, "b t"]
) -> Float[Array, "b e"]:
  """The first token's hidden state."""
  del valid
  return hidden[:, 0].astype(jnp.float32)


def pool_mean(
  hidden: Float[Array, "b t e"], valid: Int[Array, "b t"]
) -> Float[Array, "b e"]:
  """The mean over all tokens, special ones included, summed in float32."""
  hidden = jnp.where(valid[..., None] > 0, hidden.astype(jnp.float32), 0.0)
  return hidden.sum(1) / jnp.maximum(valid.sum(1, keepdims=True), 1)


def pool_max(
  hidden: Float[Array, "b t e"], valid: Int[Array, "b t"]
) -> Float[Array, "b e"]:
  """The largest value of every feature."""
  hidden = hidden.astype(jnp.float32)
  return jnp.where(valid[..., None] > 0, hidden, -jnp.inf).max(1)


POOLING: dict[str, Callable[..., jax.Array]] = {
  "cls": pool_cls,
  "mean": pool_mean,
  "max": pool_max,
}


# Static arguments, so that all calls with one model share what is compiled.
@functools.partial(jax.jit, static_argnames=("objective", "pool"))
def _embed(
  params: Any,
  batch: dict[str, jax.Array],
  *,
  objective: nn.Module,
  pool: Callable[..., jax.Array],
) -> jax.Array:
  hidden = objective.apply({"params": params}, batch, method="encode")
  return pool(hidden, batch["segment_ids"])


def embed(
  model: LoadedModel,
  texts: Sequence[str],
  pooling: str = "mean",
  batch_size: int = 32,
  max_length: int | None = None,
  *,
  normalize: bool = False,
  truncate: bool = False,
) -> np.ndarray:
  """One vector a text, float32 [n, e].

  Args:
    model: any; its heads are not used.
    texts: plain texts; the spelling of a special token is mere text.
    pooling: key of `POOLING`.
    batch_size: texts at a time.
    max_length: longest row, special tokens included; by default the model's.
    normalize: scale every vector to length 1.
    truncate: cut texts that are too long at their end.

  Raises:
    ValueError: unknown pooling, or a text that is too long.
  """
  pool = lookup(POOLING, pooling, "pooling")
  rows = rows_lib.encode_rows(
    model, texts, max_length=max_length, truncate=truncate
  )
  vectors = np.empty((len(rows), model.spec["emb_dim"]), np.float32)
  pad_id = model.need_tokenizer().pad_id
  for chosen, batch in rows_lib.batches(
    rows, batch_size, model.max_positions, pad_id
  ):
    pooled = _embed(model.params, batch, objective=model.objective, pool=pool)
    vectors[chosen] = np.asarray(pooled)[: len(chosen)]
  if normalize:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.maximum(norms, np.finfo(np.float32).tiny)
  return vectors
