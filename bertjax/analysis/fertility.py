"""How finely a tokenizer cuts the words of a corpus (Rust et al. 2021,
arXiv:2012.15613, section 3.2)."""

import collections
from collections.abc import Callable, Iterable

import numpy as np

from bertjax.data.tokenizers import Tokenizer

_BATCH = 4096  # words that are encoded together


def fertility(
  tokenizer: Tokenizer,
  texts: Iterable[str],
  clean: Callable[[str], str] = str,
) -> dict[str, float]:
  """Figures over the words of texts, as spaces divide them.

  Rust et al. count the words of treebanks, where punctuation stands apart; here
  it belongs to its word, so figures compare tokenizers on one corpus rather
  than with theirs. A word is encoded by itself, behind a space. Memory: the
  distinct words.

  Args:
    tokenizer: what is measured.
    texts: the corpus.
    clean: what texts go through first, the model's own `preprocess`.

  Returns:
    `words`, `fertility` (pieces a word, 1 at best), `continued_share` (of words
    that are cut), `unknown_share` (of words with an unknown piece),
    `characters_per_piece`.

  Raises:
    ValueError: no words.
  """
  counts = collections.Counter[str]()
  for text in texts:
    counts.update(clean(text).split())
  if not counts:
    raise ValueError("There are no words in these texts; check the source.")
  total = sum(counts.values())
  pieces = cut = unknown = characters = 0
  words = sorted(counts)
  for start in range(0, len(words), _BATCH):
    part = words[start : start + _BATCH]
    encoded = tokenizer.encode_batch([f" {word}" for word in part])
    for word, ids in zip(part, encoded, strict=True):
      count = counts[word]
      pieces += count * len(ids)
      cut += count * (len(ids) > 1)
      unknown += count * bool(np.any(ids == tokenizer.unk_id))
      characters += count * len(word)
  return {
    "words": float(total),
    "fertility": pieces / total,
    "continued_share": cut / total,
    "unknown_share": unknown / total,
    "characters_per_piece": characters / max(pieces, 1),
  }
