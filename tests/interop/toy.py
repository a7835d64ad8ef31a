"""A small model with every head, and a tokenizer, for interop tests."""

import flax.linen as nn
import jax
import numpy as np

from bertjax import interop
from bertjax.data.tokenizers import BERT_SPECIALS, ROBERTA_SPECIALS, library
from bertjax.data.tokenizers.words import WordTokenizer
from bertjax.interop import model_spec, names

WORDS = ("the", "cat", "dog", "sat", "on", "mat", "a", "##s", "t", "##he",
         ".", ",", "!")  # fmt: skip


def word_tokenizer():
  pieces = [*BERT_SPECIALS.names(), *WORDS]
  return WordTokenizer(pieces)


def byte_tokenizer():
  letters = [chr(i) for i in range(33, 127)] + ["Ġ"]
  pieces = [*ROBERTA_SPECIALS.names(), *letters, "th", "Ġc"]
  return library.byte_bpe(pieces, [("t", "h"), ("Ġ", "c")])


def spec(name="bert", **options):
  vocab = word_tokenizer() if name == "bert" else byte_tokenizer()
  return model_spec.resolve(
    dict(
      name=name,
      vocab_size=vocab.vocab_size,
      num_layers=3,
      emb_dim=12,
      num_heads=2,
      mlp_dim=20,
      max_positions=17,
      activation="gelu",
    )
    | options
  )


def params(spec, heads=names.HEADS, scan=True):
  """Random values for all parameters, nothing at a neutral value."""
  rng = np.random.default_rng(0)
  flat = {
    name: rng.normal(size=shape).astype("f4")
    for name, shape in interop.parameter_shapes(spec).items()
    if name.split("/")[0] in ("encoder", *heads)
  }
  if scan:
    flat = names.stacked(flat, spec["num_layers"])
  return names.nest(flat)


def published(spec, heads=names.HEADS, table=interop.BERT):
  """The same values under published names."""
  return interop.to_published(
    params(spec, heads), table, num_layers=spec["num_layers"]
  )


def assert_same_trees(a, b):
  """Equal names, dtypes and bits."""
  a, b = names.flatten(nn.meta.unbox(a)), names.flatten(b)
  assert sorted(a) == sorted(b), sorted(set(a) ^ set(b))
  for name in a:
    x, y = np.asarray(a[name]), np.asarray(b[name])
    assert x.dtype == y.dtype and x.tobytes() == y.tobytes(), name


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))
