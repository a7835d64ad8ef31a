"""BERT-base on this machine's CPU, against PyTorch in the same run.

  python -m benchmarks.step [--rounds=8]

A training step (batch 8 x 128, 20 masked positions a row, bfloat16, dropout
0.1, AdamW) and a forward pass, of bertjax and of `transformers` on PyTorch, in
turn, so that both see the same machine. PyTorch runs as its users run it: SDPA
attention, bfloat16 autocast, the faster of its AdamW implementations, logits of
all positions. Ratios are the medians of the rounds' own ratios.
"""

import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from bertjax import optim, train_state, train_step
from bertjax.loading import cast_matrices
from bertjax.models import bert
from bertjax.objectives import masked_lm
from bertjax.parallel.mesh import make_mesh
from bertjax.parallel.sharding import put_batch

_ROWS, _LENGTH, _MASKED, _VOCABULARY = 8, 128, 20, 30_522
_ROUNDS = flags.DEFINE_integer("rounds", 8, "Timed rounds after one warm-up.")
_THREADS = flags.DEFINE_integer("threads", 2, "PyTorch's; XLA takes all cores.")
_SCAN = flags.DEFINE_bool("scan", False, "Scanned stack.")
_PRNG = flags.DEFINE_string("prng", "threefry2x32", "Generator of dropout.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file to write.")


def ours() -> tuple[Callable[[], None], Callable[[], None]]:
  """A training step and a forward pass to hidden states."""
  rng = np.random.default_rng(0)
  positions = np.sort(
    rng.permuted(np.tile(np.arange(_LENGTH), (_ROWS, 1)), axis=1)
  )
  batch = dict(
    tokens=rng.integers(1000, _VOCABULARY, (_ROWS, _LENGTH)),
    segment_ids=np.ones((_ROWS, _LENGTH)),
    positions=np.tile(np.arange(_LENGTH), (_ROWS, 1)),
    type_ids=np.zeros((_ROWS, _LENGTH)),
    masked_positions=positions[:, :_MASKED],
    labels=rng.integers(1000, _VOCABULARY, (_ROWS, _MASKED)),
  )
  batch = {k: v.astype(np.int32) for k, v in batch.items()}
  spec = {k: jax.ShapeDtypeStruct(v.shape, v.dtype) for k, v in batch.items()}
  mesh = make_mesh(devices=jax.devices()[:1])
  encoder = bert(vocab_size=_VOCABULARY, scan=_SCAN.value, dtype=jnp.bfloat16)
  objective = masked_lm(encoder=encoder)
  params, axes = train_state.abstract_params(objective, spec)
  optimizer = optim.build_optimizer(
    dict(name="adamw", learning_rate=1e-4, weight_decay=0.01),
    total_steps=1000,
    params=params,
    logical_axes=axes,
  )
  key = jax.random.key(0, impl=_PRNG.value)
  _, shardings = train_state.state_shardings(
    objective, optimizer.transform, spec, mesh, key
  )
  state = train_state.init_state(objective, optimizer.transform, spec, key)
  step = train_step.compile_step(objective, optimizer, mesh, shardings, spec)
  held = {"state": jax.device_put(state, shardings)}
  batch = put_batch(batch, mesh)
  cast = jax.device_put(
    cast_matrices(jax.device_get(state.params), jnp.bfloat16)
  )
  encode = jax.jit(
    lambda p, b: objective.apply({"params": p}, b, method="encode")
  )

  def train() -> None:
    held["state"], metrics = step(held["state"], batch)
    jax.block_until_ready(metrics["loss"])

  def infer() -> None:
    jax.block_until_ready(encode(cast, batch))

  return train, infer


def theirs() -> tuple[Callable[[], None], Callable[[], None]]:
  """The same of `transformers` on PyTorch."""
  import torch
  from transformers import BertConfig, BertForMaskedLM

  torch.manual_seed(0)
  torch.set_num_threads(_THREADS.value)
  config = BertConfig(attn_implementation="sdpa")
  model = BertForMaskedLM(config)
  # One pass over each tensor; `foreach` and the plain loop take several.
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  tokens = torch.randint(1000, _VOCABULARY, (_ROWS, _LENGTH))
  mask = torch.ones_like(tokens)
  labels = torch.full_like(tokens, -100)
  labels[:, : _MASKED * 6 : 6] = tokens[:, : _MASKED * 6 : 6]

  def train() -> None:
    model.train()
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
      loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
    loss.backward()
    optimizer.step()

  def infer() -> None:
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
      model.bert(input_ids=tokens, attention_mask=mask)

  return train, infer


def alternate(
  first: Callable[[], None], second: Callable[[], None], rounds: int
) -> tuple[list[float], list[float]]:
  """Seconds of both, taken in turn after one untimed round."""
  times: tuple[list[float], list[float]] = ([], [])
  for number in range(rounds + 1):
    for call, seconds in zip((first, second), times):
      start = time.perf_counter()
      call()
      if number:
        seconds.append(time.perf_counter() - start)
  return times


def main(argv: list[str]) -> None:
  del argv
  tokens = _ROWS * _LENGTH
  print(
    f"BERT-base, {_ROWS} x {_LENGTH} tokens: bertjax (bfloat16, logits of"
    f" {_MASKED} positions a row) against transformers on PyTorch (bfloat16"
    f" autocast, SDPA, fused AdamW, logits of all positions, {_THREADS.value}"
    " threads); tokens/s."
  )
  results = {}
  for name, mine, other in zip(("train", "infer"), ours(), theirs()):
    rounds = _ROUNDS.value * (1 if name == "train" else 4)
    a, b = alternate(mine, other, rounds)
    ratio = statistics.median(y / x for x, y in zip(a, b))
    results[name] = dict(
      bertjax_tokens_per_s=tokens / statistics.median(a),
      pytorch_tokens_per_s=tokens / statistics.median(b),
      ratio=ratio,
    )
    print(
      f"{name:6s} bertjax {tokens / statistics.median(a):8,.0f} tokens/s"
      f"  pytorch {tokens / statistics.median(b):8,.0f}  ratio {ratio:.2f}"
    )
  if _OUTPUT.value:
    with open(_OUTPUT.value, "w", encoding="utf-8") as file:
      json.dump(results, file, indent=2)


if __name__ == "__main__":
  app.run(main)
