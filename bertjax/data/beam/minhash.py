"""Near-duplicates by MinHash (Broder 1997) and banding.

Two documents are alike as far as their sets of word n-grams overlap (Jaccard).
The share of equal numbers of two signatures estimates that, with a standard
error of sqrt(J (1 - J) / num_hashes).
"""

import dataclasses
import functools
import hashlib

import numpy as np
from jaxtyping import UInt

from bertjax.data.sources import base


@dataclasses.dataclass(frozen=True)
class MinHash:
  """Signatures of texts, and the keys under which alike ones meet.

  Texts that are alike to the degree J share a key with probability
  1 - (1 - J^r)^bands, r = num_hashes / bands: 0.998 at J = 0.8 by default,
  0.27 at 0.5.

  Attributes:
    num_hashes: length k of a signature.
    bands: keys of a text; must divide `num_hashes`.
    ngram: words of an n-gram; a shorter text is one n-gram.
    seed: of the hash functions.
  """

  num_hashes: int = 120
  bands: int = 20
  ngram: int = 5
  seed: int = 0

  def __post_init__(self):
    for name in ("num_hashes", "bands", "ngram"):
      if (value := getattr(self, name)) < 1:
        raise ValueError(f"{name}={value} must be at least 1.")
    if self.num_hashes % self.bands:
      raise ValueError(
        f"bands={self.bands} must divide num_hashes={self.num_hashes}."
      )

  @functools.cached_property
  def _functions(self) -> UInt[np.ndarray, "2 k"]:
    """x -> the high half of a x + b mod 2^64, a odd."""
    rng = np.random.default_rng(self.seed)
    a, b = rng.integers(2**64, size=(2, self.num_hashes), dtype=np.uint64)
    return np.stack([a | np.uint64(1), b])

  def ngrams(self, text: str) -> set[str]:
    """The n-grams of the text, whose case and spaces do not count."""
    words = base.normalise(text).split()
    count = max(1, len(words) - self.ngram + 1)
    return {" ".join(words[i : i + self.ngram]) for i in range(count)}

  def signature(self, text: str) -> UInt[np.ndarray, "k"]:
    """uint32, the same on every machine."""
    hashes = np.array([_hash(ngram) for ngram in self.ngrams(text)], np.uint64)
    a, b = self._functions
    least = np.full(self.num_hashes, 2**32 - 1, np.uint32)
    for start in range(0, len(hashes), 1024):  # bounds the memory
      part = hashes[start : start + 1024, None] * a + b  # modulo 2^64
      high = (part >> np.uint64(32)).astype(np.uint32)
      least = np.minimum(least, high.min(axis=0))
    return least

  def keys(self, signature: UInt[np.ndarray, "k"]) -> list[bytes]:
    """One a band; unequal bands never share one."""
    parts = signature.astype("<u4").reshape(self.bands, -1)
    return [
      i.to_bytes(4, "little")
      + hashlib.blake2b(part.tobytes(), digest_size=12).digest()
      for i, part in enumerate(parts)
    ]


def similarity(
  one: UInt[np.ndarray, "k"], other: UInt[np.ndarray, "k"]
) -> float:
  """The estimated overlap of two texts, 0..1, from their signatures."""
  return float(np.mean(one == other))


def _hash(ngram: str) -> int:
  data = ngram.encode("utf-8", "surrogatepass")
  return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
