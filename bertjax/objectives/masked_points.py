"""Masked point modelling, the pre-training of Point-BERT.

Yu et al. 2022, arXiv:2111.14819, section 3.3. A frozen tokenizer gives each
patch of a cloud its code; the encoder guesses those of hidden patches, in the
cloud and in a mixture of two. Its [CLS] is contrasted with that of a momentum
encoder. Defaults are the switches of the released run; the paper has the plain
contrast, too.

With microbatches each is a batch by itself for what a batch is here: the mean
over its own hidden patches, statistics of BatchNorm, partners of mixtures and
the keys of the mixed contrast. The momentum encoder moves once in a step, and
later microbatches find the keys of earlier ones in the queue.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from bertjax import registry
from bertjax.layers.feed_forward import gelu
from bertjax.layers.linear import Linear
from bertjax.metrics import flops, meters
from bertjax.models.point_bert import PointEncoder, PointTokenizer
from bertjax.models.point_bert.starts import kernel_init
from bertjax.objectives.base import BatchSpec, Metrics, Terms
from bertjax.objectives.frozen import Frozen, FrozenSpec, build_frozen
from bertjax.objectives.masked_lm import cross_entropy, gather_positions
from bertjax.objectives.momentum import (
  Queue,
  SlowCopy,
  contrast,
  mixed_contrast,
  unit,
)
from bertjax.objectives.point_masks import (
  MASKINGS,
  block_hides,
  mixed,
  replacements,
)
from bertjax.objectives.point_reconstruction import real
from bertjax.objectives.step import current_step
from bertjax.points import Patches
from bertjax.registry import lookup
from bertjax.reuse import Partial

Batch = Mapping[str, Any]


class ContrastHead(nn.Module):
  """[CLS] -> a unit vector: two linear maps around a GELU.

  Attributes:
    width: of the vector c, and of what lies between.
    dtype: compute dtype.
  """

  width: int
  dtype: Dtype = jnp.float32

  @nn.compact
  def __call__(self, cls: Float[Array, "b e"]) -> Float[Array, "b c"]:
    inner = Linear(
      "be,ec->bc",
      (self.width,),
      ("embed", None),
      dtype=self.dtype,
      kernel_init=kernel_init,
      name="dense",
    )(cls)
    inner = gelu(inner.astype(jnp.float32)).astype(self.dtype)
    outer = Linear(
      "bc,cd->bd",
      (self.width,),
      (None, None),
      dtype=self.dtype,
      kernel_init=kernel_init,
      name="output",
    )(inner)
    return unit(outer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
  """How patches are hidden and which terms there are.

  Attributes:
    masking: key of `MASKINGS`.
    mask_rates: smallest and largest share of hidden patches.
    replace_rate: probability that a patch that is not hidden gets the embedding
      of another; its code is guessed, too.
    mixed_tokens: whether codes are guessed in mixtures, too.
    contrast: whether clouds are contrasted.
    mixed_contrast: whether mixtures are.
    contrast_dim: width of what is contrasted.
    queue_size: keys that wait, a multiple of the clouds that are seen at once.
    momentum: share of itself that the slow encoder keeps in a step.
    temperature: of both contrasts.
    batch_statistics: whether, in training, the tokenizer normalises by the
      batch, as in the released run, or by its own averages.
  """

  masking: str = "block"
  mask_rates: Sequence[float] = (0.25, 0.45)
  replace_rate: float = 0.0
  mixed_tokens: bool = True
  contrast: bool = False
  mixed_contrast: bool = True
  contrast_dim: int = 512
  queue_size: int = 16_384
  momentum: float = 0.999
  temperature: float = 0.07
  batch_statistics: bool = False

  def __post_init__(self):
    lookup(MASKINGS, self.masking, "objective.masking")
    rates = tuple(self.mask_rates)
    if len(rates) != 2 or not 0 < rates[0] <= rates[1] <= 1:
      raise ValueError(
        f"objective.mask_rates={rates} must be the smallest and the largest"
        " share of hidden patches, in (0, 1]."
      )
    for name in ("replace_rate", "momentum"):
      if not 0 <= getattr(self, name) <= 1:
        raise ValueError(
          f"objective.{name}={getattr(self, name)} must lie in [0, 1]."
        )
    for name in ("contrast_dim", "queue_size", "temperature"):
      if getattr(self, name) <= 0:
        raise ValueError(
          f"objective.{name}={getattr(self, name)} must be positive."
        )

  @property
  def terms(self) -> tuple[str, ...]:
    """Names of the terms of the loss."""
    switches = ("mixed_tokens", "contrast", "mixed_contrast")
    return ("tokens", *(name for name in switches if getattr(self, name)))


class Guess(NamedTuple):
  """What one pass over a cloud with hidden patches says.

  Attributes:
    cls: final state of [CLS].
    logits: of codes, at m places of each cloud.
    targets: the codes there, -1 where nothing is asked.
  """

  cls: Float[Array, "b e"]
  logits: Float[Array, "b m v"]
  targets: Int[Array, "b m"]


class MaskedPoints(nn.Module):
  """Codes of hidden patches, and contrasts of [CLS].

  Without a stream of random numbers, as in evaluation, all batches are hidden
  alike and nothing is contrasted.

  Attributes:
    encoder: what is trained.
    make_tokenizer: makes the frozen model, whose `codes` are guessed.
    vocab_size: how many codes it has, v.
    options: see there.
    fresh: see `Objective`.
    reads: see `Objective`.
    independent_rows: see `Objective`.
  """

  encoder: PointEncoder
  make_tokenizer: Callable[[], nn.Module]
  vocab_size: int
  options: Options = Options()
  fresh: ClassVar[tuple[str, ...]] = ()
  reads: ClassVar[tuple[str, ...]] = ("points",)
  independent_rows: ClassVar[bool] = False

  def setup(self):
    dtype = self.encoder.style.dtype
    self.tokenizer = Frozen(self.make_tokenizer)
    self.token_head = Linear(
      "bme,ev->bmv",
      (self.vocab_size,),
      ("embed", "vocab"),
      dtype=dtype,
      kernel_init=kernel_init,
    )
    if self.contrasts:
      self.contrast_head = ContrastHead(self.options.contrast_dim, dtype)
      self.slow = SlowCopy(self.options.momentum)
      self.queue = Queue(self.options.queue_size, self.options.contrast_dim)

  @property
  def least_points(self) -> int:
    """Of a cloud that this can be asked of."""
    return self.encoder.least_points

  @property
  def contrasts(self) -> bool:
    """Whether there is a contrast head."""
    return self.options.contrast or self.options.mixed_contrast

  @property
  def coefficients(self) -> dict[str, float]:
    return dict.fromkeys(self.options.terms, 1.0)

  def weights(self, batch: Batch) -> Terms:
    """Clouds: how many patches of them are hidden is drawn later."""
    return dict.fromkeys(self.options.terms, real(batch).sum())

  def __call__(self, batch: Batch, *, train: bool) -> tuple[Terms, Metrics]:
    batch, valid = self.encoder.prepare(batch), real(batch) > 0
    patches = batch["patches"]
    has_stream = self.has_rng("dropout")
    key = self.make_rng("dropout") if has_stream else jax.random.key(0)
    keys = jax.random.split(key, 4)
    codes = self.tokenizer(
      patches,
      method="codes",
      train=train and self.options.batch_statistics,
    )
    codes = jnp.where(valid[:, None], codes, -1)
    guess = self._guess(keys[0], patches, codes, train=train)
    sums, metrics = token_terms("tokens", guess, valid)
    metrics["frequent_code_share"] = frequent(guess.targets, self.vocab_size)
    mixture, mixed_guess = None, None
    if self.options.mixed_tokens or self.options.mixed_contrast:
      mixture = mixed(keys[1], patches, codes)
      mixed_guess = self._guess(
        keys[2], mixture.patches, mixture.codes, train=train
      )
    if self.options.mixed_tokens:
      found, more = token_terms("mixed_tokens", mixed_guess, valid)
      sums, metrics = sums | found, metrics | more
    if self.contrasts and (train or self.is_initializing()):
      found, more = self._contrast(
        keys[3],
        patches,
        guess,
        mixed_guess,
        None if mixture is None else mixture.ratios,
        valid,
      )
      sums, metrics = sums | found, metrics | more
    return sums, metrics

  def _hide(
    self, key: jax.Array, patches: Patches
  ) -> tuple[dict[str, Any], Bool[Array, "b g"]]:
    """What the encoder reads, and of which patches codes are asked."""
    hiding, moving = jax.random.split(key)
    masking = MASKINGS[self.options.masking]
    masked = masking.draw(hiding, patches.centres, *self.options.mask_rates)
    batch, asked = {"patches": patches, "masked": masked}, masked
    if self.options.replace_rate:
      batch["sources"], moved = replacements(
        moving, masked, self.options.replace_rate
      )
      asked = masked | moved
    return batch, asked

  def _guess(
    self,
    key: jax.Array,
    patches: Patches,
    codes: Int[Array, "b g"],
    *,
    train: bool,
  ) -> Guess:
    batch, asked = self._hide(key, patches)
    hidden = self.encoder(batch, train=train).hidden
    # The head is dear: it looks at no more places than may be asked about.
    places = jnp.argsort(~asked, axis=1)[:, : self._slots(codes.shape[1])]
    logits = self.token_head(gather_positions(hidden[:, 1:], places))
    targets = jnp.where(asked, codes, -1)
    return Guess(
      hidden[:, 0],
      logits.astype(jnp.float32),
      jnp.take_along_axis(targets, places, axis=1),
    )

  def _slots(self, patches: int) -> int:
    """The largest number of places that are asked about in a cloud."""
    bounded = MASKINGS[self.options.masking].bounded
    if not bounded or self.options.replace_rate:
      return patches
    return min(patches, math.ceil(self.options.mask_rates[1] * patches))

  def _contrast(
    self,
    key: jax.Array,
    patches: Patches,
    guess: Guess,
    mixed_guess: Guess | None,
    ratios: Float[Array, " b"] | None,
    valid: Bool[Array, " b"],
  ) -> tuple[Terms, Metrics]:
    """The contrasts; moves the slow encoder and then the queue."""
    queries = self.contrast_head(guess.cls)
    # Of while they wait: those of this batch enter at the end.
    queue, temperature = self.queue(), self.options.temperature
    keys = self._slow_keys(key, patches, queries)
    found = {}
    if self.options.contrast:
      found["contrast"] = contrast(queries, keys, queue, temperature)
    if self.options.mixed_contrast:
      found["mixed_contrast"] = mixed_contrast(
        self.contrast_head(mixed_guess.cls), keys, queue, ratios, temperature
      )
    self.queue.push(keys)
    count = valid.sum().astype(jnp.float32)
    sums, metrics = {}, {}
    for name, (losses, hits) in found.items():
      sums[name] = jnp.where(valid, losses, 0.0).sum()
      metrics[f"{name}_loss"] = sums[name], count
      metrics[f"{name}_accuracy"] = jnp.where(valid, hits, 0.0).sum(), count
    return sums, metrics

  def _slow_keys(
    self, key: jax.Array, patches: Patches, queries: Float[Array, "b c"]
  ) -> Float[Array, "b c"]:
    """Keys of the clouds, with other patches hidden than for the queries."""
    stats = self.encoder.variables.get("batch_stats", {})
    slow = self.slow(
      {
        "encoder": self.encoder.variables["params"],
        "contrast_head": self.contrast_head.variables["params"],
      },
      current_step(self),
    )
    if self.is_initializing():
      return queries
    hiding, dropping = jax.random.split(key)
    # As the trained one: in training mode, its averages of BatchNorm left out.
    encoded, _ = self.encoder.clone(parent=None, name=None).apply(
      {"params": slow["encoder"], "batch_stats": stats},
      self._hide(hiding, patches)[0],
      train=True,
      rngs={"dropout": dropping},
      mutable=["batch_stats"],
    )
    head = self.contrast_head.clone(parent=None, name=None)
    keys = head.apply({"params": slow["contrast_head"]}, encoded.hidden[:, 0])
    return jax.lax.stop_gradient(keys)

  def encode(self, batch: Batch) -> Float[Array, "b t e"]:
    """Final states of [CLS] and of patches, none of them hidden."""
    return self.encoder(batch, train=False).hidden

  def project(self, batch: Batch) -> Float[Array, "b c"]:
    """What is contrasted of clouds without hidden patches; unit vectors."""
    return self.contrast_head(self.encode(batch)[:, 0])

  def outputs(self, batch: Batch) -> Terms:
    """States and, for each patch, scores of its code."""
    hidden = self.encode(batch)
    logits = self.token_head(hidden[:, 1:]).astype(jnp.float32)
    return {"hidden": hidden, "token_logits": logits}

  def row_flops(self, params: Any, batch: BatchSpec) -> float:
    """Of guesses in a cloud and its mixture, and of what needs no gradient.

    A training step is counted as three of these, so the tokenizer and the slow
    encoder, which are not differentiated, count a third here.
    """
    del params
    num_points = batch["points"].shape[1]
    cloud = jax.ShapeDtypeStruct((1, num_points, 3), jnp.float32)

    def coded(cloud):
      patches = self.encoder.prepare({"points": cloud})["patches"]
      return self.make_tokenizer().init(
        jax.random.key(0), patches, method="codes"
      )

    trunk = self.encoder.cloud_flops(num_points)
    slots = self._slots(self.encoder.patches)
    head = 2 * slots * self.encoder.style.emb_dim * self.vocab_size
    mixes = self.options.mixed_tokens or self.options.mixed_contrast
    found = (1 + mixes) * (trunk + head)
    without_gradient = flops.products(coded, cloud) + self.contrasts * trunk
    return found + without_gradient / meters.TRAINING


def token_terms(
  name: str, guess: Guess, valid: Bool[Array, " b"]
) -> tuple[Terms, Metrics]:
  """A term whose mean over clouds is the mean over all that was asked."""
  loss, correct, count = cross_entropy(guess.logits, guess.targets)
  clouds = valid.sum().astype(jnp.float32)
  return {name: loss / jnp.maximum(count, 1.0) * clouds}, {
    f"{name}_loss": (loss, count),
    f"{name}_accuracy": (correct, count),
  }


def frequent(
  targets: Int[Array, "b m"], vocab_size: int
) -> tuple[Float[Array, ""], Float[Array, ""]]:
  """How often the batch's most frequent code is right, of how many.

  What guessing it always would achieve: if tokens are not more accurate, the
  encoder has learned how often codes occur, and no more.
  """
  asked = (targets >= 0).astype(jnp.float32)
  counts = jnp.zeros((vocab_size,), jnp.float32)
  counts = counts.at[jnp.maximum(targets, 0)].add(asked)
  return counts.max(), asked.sum()


def _itself(made):
  return made


def masked_points(
  *, encoder: PointEncoder, tokenizer: FrozenSpec, **options: Any
) -> MaskedPoints:
  """Builds the objective.

  Args:
    encoder: of point clouds.
    tokenizer: what gives patches their codes.
    **options: see `Options`.

  Raises:
    ValueError: an unknown option, a bad value, a frozen model that is no
      tokenizer of the encoder's patches, or rates that hide none of them.
  """
  made = build_frozen(
    tokenizer, "objective.tokenizer", dtype=encoder.style.dtype
  )
  if not isinstance(made, PointTokenizer):
    raise ValueError(
      f"objective.tokenizer.name={tokenizer['name']!r} gives a"
      f" {type(made).__name__}, which has no codes of patches; choose"
      " 'point_tokenizer'."
    )
  if made.size != encoder.patch_size:
    raise ValueError(
      f"objective.tokenizer.patch_size={made.size} differs from"
      f" model.patch_size={encoder.patch_size}: both read the same patches."
    )
  chosen = registry.call(Options, options, "objective")
  rates, patches = tuple(chosen.mask_rates), encoder.patches
  bounded = MASKINGS[chosen.masking].bounded
  if bounded and not (chosen.replace_rate or block_hides(*rates, patches)):
    raise ValueError(
      f"objective.mask_rates={rates} of model.patches={patches} never hide a"
      " patch, so that no code is guessed; the largest share times the patches"
      " must exceed 1."
    )
  return MaskedPoints(
    encoder,
    Partial(_itself, made),  # an attribute that is a module would be trained
    made.vocab_size,
    chosen,
  )
