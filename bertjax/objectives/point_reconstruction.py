"""Learning a tokenizer of point clouds (Yu et al. 2022, section 3.2).

A discrete autoencoder: patches become mixtures of codes and patches again. The
loss is how far the decoded points lie from the patch's own, and how unevenly
the codes are used.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

from bertjax import points
from bertjax.metrics import flops
from bertjax.models.point_bert import PointTokenizer, Reconstruction
from bertjax.models.point_bert.tokenizer import uniformity
from bertjax.objectives.base import BatchSpec, Metrics, Terms
from bertjax.objectives.schedules import HalfCosine
from bertjax.objectives.step import current_step
from bertjax.points import Patches

Batch = Mapping[str, ArrayLike]

# Distances between whole clouds are reported in thousandths.
THOUSANDTHS = 1000.0


class PointReconstruction(nn.Module):
  """Patches decoded from their codes.

  In training codes are mixed by a Gumbel-softmax that cools down, and the
  weight of their evenness grows, both by the step of training. Elsewhere each
  patch has its likeliest code, and whole clouds are compared as well.

  Attributes:
    encoder: what is trained.
    temperature: of the Gumbel-softmax, by step.
    kl_weight: of KL(uniform || codes of a cloud), by step.
    threshold: distance below which a point counts as hit in the F-score.
    fresh: see `Objective`.
    reads: see `Objective`.
    independent_rows: see `Objective`.
  """

  encoder: PointTokenizer
  temperature: HalfCosine
  kl_weight: HalfCosine
  threshold: float = 0.01
  fresh: ClassVar[tuple[str, ...]] = ()
  reads: ClassVar[tuple[str, ...]] = ("points",)
  independent_rows: ClassVar[bool] = False

  @property
  def least_points(self) -> int:
    """Of a cloud that this can be asked of."""
    return self.encoder.least_points

  @property
  def coefficients(self) -> dict[str, float]:
    return {"reconstruction": 1.0, "kl": 1.0}

  def weights(self, batch: Batch) -> Terms:
    count = real(batch).sum()
    return {"reconstruction": count, "kl": count}

  def __call__(self, batch: Batch, *, train: bool) -> tuple[Terms, Metrics]:
    patches = self.encoder.group(batch["points"])
    step, told = current_step(self), {}
    if step is None:
      found = self.encoder(patches, train=train, hard=True)
      weight = self.kl_weight.end
    else:
      temperature, weight = self.temperature(step), self.kl_weight(step)
      found = self.encoder(patches, train=train, temperature=temperature)
      told = {"temperature": temperature, "kl_weight": weight}
    kept = real(batch)
    clouds = {
      "coarse_l1": patch_distance(found.coarse, patches),
      "fine_l1": patch_distance(found.fine, patches),
      "kl": uniformity(found.logits),
    }
    sums = {name: (kept * x).sum() for name, x in clouds.items()}
    terms = {
      "reconstruction": sums["coarse_l1"] + sums["fine_l1"],
      "kl": weight * sums["kl"],
    }
    if step is None:
      whole = self._whole(batch["points"], patches, found)
      sums |= {name: (kept * x).sum() for name, x in whole.items()}
    metrics = {name: (x, kept.sum()) for name, x in sums.items()}
    metrics["code_perplexity"] = (
      perplexity(code_counts(found.logits, kept)),
      jnp.float32(1),
    )
    one = jnp.ones((), jnp.float32)
    return terms, metrics | {name: (x, one) for name, x in told.items()}

  def measure(self, batch: Batch) -> tuple[Terms, Float[Array, " v"]]:
    """What an evaluation says of each cloud, and how often each code is used.

    Returns:
      Arrays [b] by name: `cd_l1` and `cd_l2` between whole clouds, in
      thousandths, `f_score`, and `coarse_l1` and `fine_l1` within patches; and
      counts [v].
    """
    patches = self.encoder.group(batch["points"])
    found = self.encoder(patches, train=False, hard=True)
    clouds = {
      "coarse_l1": patch_distance(found.coarse, patches),
      "fine_l1": patch_distance(found.fine, patches),
      **self._whole(batch["points"], patches, found),
    }
    return clouds, code_counts(found.logits, real(batch))

  def _whole(
    self, cloud: jax.Array, patches: Patches, found: Reconstruction
  ) -> Terms:
    """Distances of all decoded points from the cloud, [b] each."""
    distance = points.chamfer(assembled(found.fine, patches), cloud)
    return {
      "cd_l1": THOUSANDTHS * distance.l1,
      "cd_l2": THOUSANDTHS * distance.l2,
      "f_score": distance.f_score(self.threshold),
    }

  def encode(self, batch: Batch) -> Float[Array, "b g e"]:
    """A vector for each patch, before any code is chosen."""
    return self.encoder.embedded(self.encoder.group(batch["points"]))

  def outputs(self, batch: Batch) -> Terms:
    """Codes of the patches [b, g], and the points decoded from them."""
    patches = self.encoder.group(batch["points"])
    found = self.encoder(patches, train=False, hard=True)
    return {
      "codes": found.logits.argmax(-1),
      "logits": found.logits,
      "centres": patches.centres,
      "points": assembled(found.fine, patches),
    }

  def row_flops(self, params: Any, batch: BatchSpec) -> float:
    """Of all dense layers, and of the mixture of codes."""
    del params
    shape = batch["points"].shape[1:]
    cloud = jax.ShapeDtypeStruct((1, *shape), jnp.float32)

    def forward(cloud):
      return self.init(jax.random.key(0), {"points": cloud}, train=False)

    return flops.products(forward, cloud)


def real(batch: Batch) -> Float[Array, " b"]:
  """1 for clouds, 0 for rows that fill a batch."""
  if "index" not in batch:
    return jnp.ones(batch["points"].shape[0], jnp.float32)
  return (batch["index"] >= 0).astype(jnp.float32)


def patch_distance(
  decoded: Float[Array, "b g k 3"], patches: Patches
) -> Float[Array, " b"]:
  """CD-L1 of decoded and true patches, averaged over those of a cloud."""
  b, g, m, _ = patches.points.shape
  distance = points.chamfer(
    decoded.reshape(b * g, -1, 3), patches.points.reshape(b * g, m, 3)
  )
  return distance.l1.reshape(b, g).mean(1)


def assembled(
  decoded: Float[Array, "b g k 3"], patches: Patches
) -> Float[Array, "b gk 3"]:
  """Decoded patches at their centres, as one cloud."""
  placed = decoded + patches.centres[:, :, None]
  return placed.reshape(len(placed), -1, 3)


def code_counts(
  logits: Float[Array, "b g v"], kept: Float[Array, " b"]
) -> Float[Array, " v"]:
  """How often each code is the likeliest of a patch."""
  codes = logits.argmax(-1)
  weights = jnp.broadcast_to(kept[:, None], codes.shape)
  return jnp.zeros(logits.shape[-1], jnp.float32).at[codes].add(weights)


def perplexity(counts: Float[Array, " v"]) -> Float[Array, ""]:
  """exp of the entropy of the codes: as many, evenly used, would have it."""
  share = counts / jnp.maximum(counts.sum(), 1)
  return jnp.exp(jax.scipy.special.entr(share).sum())


def point_reconstruction(
  *,
  encoder: PointTokenizer,
  temperature: float = 1.0,
  temperature_end: float = 0.0625,
  temperature_steps: int = 100_000,
  kl_weight: float = 0.1,
  kl_delay: int = 10_000,
  kl_steps: int = 100_000,
  threshold: float = 0.01,
) -> PointReconstruction:
  """Builds the objective, by default with the authors' schedules.

  Args:
    encoder: what is trained.
    temperature: of the Gumbel-softmax at first.
    temperature_end: at last.
    temperature_steps: steps between the two.
    kl_weight: of the evenness of codes at last; 0 at first.
    kl_delay: steps before it grows.
    kl_steps: steps of its growth.
    threshold: see `PointReconstruction`.

  Raises:
    ValueError: a number that must be positive, or not negative, is not.
  """
  positive = dict(
    temperature=temperature,
    temperature_end=temperature_end,
    temperature_steps=temperature_steps,
    kl_steps=kl_steps,
    threshold=threshold,
  )
  for name, value in positive.items():
    if not value > 0:
      raise ValueError(f"objective.{name}={value} must be positive.")
  for name, value in dict(kl_weight=kl_weight, kl_delay=kl_delay).items():
    if not value >= 0:
      raise ValueError(f"objective.{name}={value} must not be negative.")
  return PointReconstruction(
    encoder,
    HalfCosine(temperature, temperature_end, temperature_steps),
    HalfCosine(0.0, kl_weight, kl_steps, kl_delay),
    threshold,
  )
