"""How fast a run goes: tokens per second, step time, and share of the peak.

MFU (model FLOPs utilisation; Chowdhery et al. 2022, arXiv:2204.02311, appendix
B) counts the arithmetic that the model needs, not what the program does:
rematerialisation and padding earn nothing.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp

from bertjax.hardware import chips


def forward_flops(
  *,
  num_layers: int,
  emb_dim: int,
  mlp_dim: int,
  seq_len: int,
  vocab_size: int,
  max_masked: int,
  attention_dim: int | None = None,
  mlp_matmuls: int = 2,
) -> float:
  """FLOPs of the matrix products of one row's forward pass (MLM).

  Per layer 8 t e a (query, key, value, output), 4 t^2 a (scores and their
  use) and 2 n t e f (feed-forward); the head 2 m e (e + v).

  Args:
    num_layers: l.
    emb_dim: e.
    mlp_dim: f.
    seq_len: t.
    vocab_size: v.
    max_masked: m, positions for which the vocabulary is predicted.
    attention_dim: a, heads times head width; by default e.
    mlp_matmuls: n, 2, or 3 for a gated feed-forward.
  """
  attention_dim = emb_dim if attention_dim is None else attention_dim
  layer = (
    8 * seq_len * emb_dim * attention_dim
    + 4 * seq_len**2 * attention_dim
    + 2 * mlp_matmuls * seq_len * emb_dim * mlp_dim
  )
  head = 2 * max_masked * emb_dim * (emb_dim + vocab_size)
  return float(num_layers * layer + head)


# A training step's FLOPs over the forward pass's: backward costs two of them.
TRAINING = 3


def train_flops(**sizes: int) -> float:
  """FLOPs of one row's training step."""
  return TRAINING * forward_flops(**sizes)


@dataclasses.dataclass(frozen=True)
class Peak:
  """FLOP/s that all devices of a run reach at best.

  Attributes:
    flops: FLOP/s in total.
    measured: True when it is this machine's fastest matrix product rather
      than a data sheet's figure.
  """

  flops: float
  measured: bool


def peak_flops(devices: Sequence[jax.Device] | None = None) -> Peak | None:
  """Peak of `devices` (default: all); None for hardware not in `chips`.

  All CPU devices of a process share its cores, so a CPU's peak is measured
  once per process and does not grow with fake devices.
  """
  devices = jax.devices() if devices is None else devices
  if devices[0].platform == "cpu":
    processes = len({d.process_index for d in devices})
    return Peak(processes * _measured_cpu_flops(), measured=True)
  each = chips.peak_flops(devices[0].device_kind)
  return None if each is None else Peak(len(devices) * each, measured=False)


@functools.cache
def _measured_cpu_flops(size: int = 1536, repeats: int = 3) -> float:
  """Best FLOP/s of a square product, in bfloat16 or float32."""
  best = 0.0
  for dtype in (jnp.bfloat16, jnp.float32):
    # float32 accumulation: XLA's CPU backend is slow in bfloat16 without it.
    multiply = jax.jit(
      functools.partial(jnp.matmul, preferred_element_type=jnp.float32)
    )
    x = jnp.ones((size, size), dtype)
    multiply(x, x).block_until_ready()
    for _ in range(repeats):
      start = time.perf_counter()
      multiply(x, x).block_until_ready()
      best = max(best, 2 * size**3 / (time.perf_counter() - start))
  return best


class Throughput:
  """Rates between two readings, without compilation and pauses.

  Call `start` once the first step is done (it compiles), `add` after every
  step, and `read` when the device has caught up.
  """

  def __init__(
    self,
    *,
    flops_per_token: float | None = None,
    peak: Peak | None = None,
    clock: Callable[[], float] = time.perf_counter,
  ):
    """Stopped until `start`.

    Args:
      flops_per_token: training FLOPs of one real token, for MFU.
      peak: of all devices, for MFU.
      clock: seconds.
    """
    self._flops_per_token = flops_per_token
    self._peak = peak
    self._clock = clock
    self._since: float | None = None

  def start(self) -> None:
    """Begins a window now."""
    self._since = self._clock()

  @property
  def running(self) -> bool:
    return self._since is not None

  @contextlib.contextmanager
  def pause(self) -> Iterator[None]:
    """Time inside (evaluation, saving) does not count."""
    begin = self._clock()
    try:
      yield
    finally:
      if self._since is not None:
        self._since += self._clock() - begin

  def read(self, steps: int, tokens: float, slots: float) -> dict[str, float]:
    """Rates of the window that ends now; the next one begins.

    Args:
      steps: optimizer steps in the window.
      tokens: real tokens in them, over all hosts.
      slots: tokens and padding.

    Returns:
      `step_time_s`, `tokens_per_s`, `slots_per_s` and, when FLOPs and peak are
      known, `mfu`; empty when nothing was timed.
    """
    if self._since is None or steps == 0:
      return {}
    now = self._clock()
    seconds = max(now - self._since, 1e-9)
    self._since = now
    rates = {
      "step_time_s": seconds / steps,
      "tokens_per_s": tokens / seconds,
      "slots_per_s": slots / seconds,
    }
    if self._flops_per_token is not None and self._peak is not None:
      rates["mfu"] = tokens * self._flops_per_token / seconds / self._peak.flops
    return rates
