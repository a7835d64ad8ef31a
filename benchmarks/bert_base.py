"""BERT-base training steps and forward passes, ours and PyTorch's.

PyTorch runs as its users run it: `transformers`, SDPA attention, the faster of
its AdamW implementations, logits of all positions. Ours has logits of the
masked positions. Both: dropout 0.1 and AdamW. Both multiply in the dtype that
PyTorch is faster in on this CPU. Where that is bfloat16, training has weights
in float32 (PyTorch: autocast) and inference in bfloat16: PyTorch's autocast,
which casts them in every call, is slower. Where a CPU has no bfloat16, PyTorch
takes several times as long in it as in float32, and no user of it would.
"""

import copy
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from bertjax import optim, train_state, train_step
from bertjax.loading import cast_matrices
from bertjax.models import bert
from bertjax.objectives import masked_lm
from bertjax.parallel.mesh import make_mesh
from bertjax.parallel.sharding import put_batch

VOCABULARY = 30_522
# Names of the two calls of either side, by the dtype of their products.
PASSES = {
  "bfloat16": ("train", "infer_bf16"),
  "float32": ("train_f32", "infer_f32"),
}
Batch = Mapping[str, np.ndarray]
Call = Callable[[], None]


def ours(
  batches: Sequence[Batch],
  *,
  dtype: str = "bfloat16",
  size: str = "base",
  scan: bool = False,
  prng: str = "threefry2x32",
) -> tuple[Call, Call]:
  """A pass of training steps, and one of forward passes to hidden states.

  Args:
    batches: of one shape, as the objective takes them.
    dtype: of products, and of the weights of forward passes.
    size: of the BERT.
    scan: the stack of layers.
    prng: generator of dropout.
  """
  spec = {
    name: jax.ShapeDtypeStruct(x.shape, x.dtype)
    for name, x in batches[0].items()
  }
  mesh = make_mesh(devices=jax.devices()[:1])
  encoder = bert(
    vocab_size=VOCABULARY, size=size, scan=scan, dtype=jnp.dtype(dtype)
  )
  objective = masked_lm(encoder=encoder)
  params, axes = train_state.abstract_params(objective, spec)
  optimizer = optim.build_optimizer(
    dict(name="adamw", learning_rate=1e-4, weight_decay=0.01),
    total_steps=1000,
    params=params,
    logical_axes=axes,
  )
  key = jax.random.key(0, impl=prng)
  _, shardings = train_state.state_shardings(
    objective, optimizer.transform, spec, mesh, key
  )
  state = train_state.init_state(objective, optimizer.transform, spec, key)
  step = train_step.compile_step(objective, optimizer, mesh, shardings, spec)
  held = {"state": jax.device_put(state, shardings)}
  put = [put_batch(dict(batch), mesh) for batch in batches]
  cast = jax.device_put(cast_matrices(jax.device_get(state.params), dtype))
  encode = jax.jit(
    lambda p, b: objective.apply({"params": p}, b, method="encode")
  )

  def train() -> None:
    for batch in put:
      held["state"], metrics = step(held["state"], batch)
    jax.block_until_ready(metrics["loss"])

  def infer() -> None:
    for batch in put:
      hidden = encode(cast, batch)
    jax.block_until_ready(hidden)

  return train, infer


def theirs(
  batches: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
  threads: int,
  dtype: str = "bfloat16",
) -> tuple[Call, Call]:
  """The same of `transformers` on PyTorch.

  Args:
    batches: (tokens, mask of what is no padding, labels or -100) [b, t] each.
    threads: of PyTorch.
    dtype: as of `ours`.
  """
  import torch
  from transformers import BertConfig, BertForMaskedLM

  torch.manual_seed(0)
  torch.set_num_threads(threads)
  config = BertConfig(attn_implementation="sdpa")
  model = BertForMaskedLM(config)
  # One pass over each tensor; `foreach` and the plain loop take several.
  optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
  put = [
    tuple(torch.from_numpy(np.asarray(x, np.int64)) for x in batch)
    for batch in batches
  ]

  def train() -> None:
    model.train()
    for tokens, mask, labels in put:
      optimizer.zero_grad()
      with torch.autocast(
        "cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"
      ):
        loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
      loss.backward()
      optimizer.step()

  encoder = copy.deepcopy(model.bert).to(getattr(torch, dtype)).eval()

  def infer() -> None:
    with torch.inference_mode():
      for tokens, mask, _ in put:
        encoder(input_ids=tokens, attention_mask=mask)

  return train, infer


def fastest_dtype(threads: int) -> str:
  """That of `PASSES` in which PyTorch multiplies fastest on this CPU."""
  import torch

  torch.set_num_threads(threads)

  def seconds(dtype: str) -> float:
    x, y = (
      torch.ones(shape, dtype=getattr(torch, dtype))
      for shape in ((512, 768), (768, 768))
    )
    times, _ = alternate(lambda: x @ y, lambda: None, rounds=3)
    return min(times)

  return min(PASSES, key=seconds)


def alternate(
  first: Call, second: Call, rounds: int
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


def compare(
  tokens: int, mine: Call, other: Call, rounds: int, threads: int
) -> dict[str, float]:
  """Tokens per second of both, and the rounds' own ratios: median and ends.

  Args:
    tokens: real ones of a call.
    mine: ours.
    other: PyTorch's.
    rounds: timed ones.
    threads: that PyTorch has, for the record.
  """
  a, b = alternate(mine, other, rounds)
  ratios = [y / x for x, y in zip(a, b)]
  return {
    "bertjax_tokens_per_s": tokens / statistics.median(a),
    "pytorch_tokens_per_s": tokens / statistics.median(b),
    "ratio": statistics.median(ratios),
    "ratio_least": min(ratios),
    "ratio_most": max(ratios),
    "rounds": rounds,
    "threads": threads,
  }


def show(name: str, found: Mapping[str, float]) -> None:
  """Prints one comparison."""
  print(
    f"{name:14s} bertjax {found['bertjax_tokens_per_s']:8,.0f} tokens/s"
    f"  pytorch {found['pytorch_tokens_per_s']:8,.0f}"
    f"  ratio {found['ratio']:.2f}"
    f" ({found['ratio_least']:.2f} to {found['ratio_most']:.2f} in"
    f" {found['rounds']} rounds)",
    flush=True,
  )
