"""Which backend runs: the named one, or the lowering platform's."""

import dataclasses
import importlib
from typing import NamedTuple

import jax
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from kernels.flash_attention import backend as backends
from kernels.flash_attention import blockwise, dense, reference
from kernels.flash_attention.backend import Backend
from kernels.flash_attention.capabilities import refuse
from kernels.flash_attention.options import Extras, Options, Unsupported

_PACKAGE = __name__.rpartition(".")[0]

# Modules of this package, imported when first used: Pallas takes a while.
BACKENDS = ("reference", "dense", "blockwise", "gpu", "tpu")
# Plain JAX, and differentiated by it: the partitioner splits them by itself.
PLAIN = {"reference": reference.attend, "dense": dense.attend}


class Platform(NamedTuple):
  """What a platform runs: a backend, and its fastest dropout generator."""

  backend: str
  generator: str = "counter"


PLATFORMS = {"cuda": Platform("gpu"), "tpu": Platform("tpu", "hardware")}
OTHER = Platform("blockwise")


def module(name: str) -> Backend:
  """The backend of that name.

  Raises:
    ValueError: there is none.
  """
  if name not in BACKENDS:
    raise ValueError(
      f"backend={name!r} is unknown; choose from {', '.join(BACKENDS)}."
    )
  return importlib.import_module(f"{_PACKAGE}.{name}")


def resolve(options: Options, platform: Platform) -> Options:
  """Replaces dropout_generator="auto" by the platform's."""
  if options.dropout_generator != "auto":
    return options
  return dataclasses.replace(options, dropout_generator=platform.generator)


def _platform_backend(platform, q, k, v, extras, options):
  """The platform's backend, or blockwise if that refuses."""
  backend = module(platform.backend)
  resolved = resolve(options, platform)
  try:
    refuse(backend.CAPABILITIES, q, k, v, extras, resolved)
  except Unsupported:
    return module(OTHER.backend), resolve(options, OTHER)
  return backend, resolved


class ByPlatform:
  """The backend that is chosen when the program is lowered for a platform.

  Compiling for a TPU on a laptop takes the TPU's kernels. A platform whose
  kernels refuse the options runs blockwise. Both passes choose alike.
  """

  # Some platform runs what blockwise can do; "auto" is resolved later.
  CAPABILITIES = dataclasses.replace(
    blockwise.CAPABILITIES, generators=("counter", "auto")
  )

  @staticmethod
  def forward(q, k, v, extras, options):
    return _run("forward", q, k, v, extras, options)

  @staticmethod
  def backward(q, k, v, extras, options, *rest):
    return _run("backward", q, k, v, extras, options, *rest)


def _run(direction, q, k, v, extras, options, *rest):
  mask = extras.block_mask
  static = isinstance(mask, np.ndarray)

  def branch(platform):
    backend, resolved = _platform_backend(platform, q, k, v, extras, options)

    def run(q, k, v, extras, *rest):
      if static:
        extras = extras._replace(block_mask=mask)
      return getattr(backend, direction)(q, k, v, extras, resolved, *rest)

    return run

  # A static mask must not become an operand, which would make it traced.
  operands = extras._replace(block_mask=None) if static else extras
  default = branch(OTHER)
  branches = {name: branch(platform) for name, platform in PLATFORMS.items()}
  # To trace another platform's kernels takes longer than a layer's rest.
  device = jax.sharding.get_abstract_mesh().abstract_device
  if device is not None and device.platform != "gpu":  # CUDA or ROCm
    chosen = branches.get(device.platform, default)
    return chosen(q, k, v, operands, *rest)
  return jax.lax.platform_dependent(
    q, k, v, operands, *rest, default=default, **branches
  )


def choose(name: str | None, options: Options) -> tuple[Backend, Options]:
  """The named backend, or the choice by platform, and its options.

  Raises:
    ValueError: unknown name.
  """
  if name is None:
    return ByPlatform, options
  platforms = {p.backend: p for p in PLATFORMS.values()}
  return module(name), resolve(options, platforms.get(name, OTHER))


def attend(
  name: str | None,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  extras: Extras,
  options: Options,
) -> tuple[jax.Array, jax.Array]:
  """(out, lse) of the named backend, or of the platform lowered for.

  Raises:
    ValueError: unknown name, shapes that do not fit, or `Unsupported`.
  """
  backend, options = choose(name, options)
  if name in PLAIN:
    found = PLAIN[name](q, k, v, extras, options)
    out, lse = map(checkpoint_name, found, backends.RESIDUALS)
    return out, lse
  return backends.attend(backend, q, k, v, extras, options)
