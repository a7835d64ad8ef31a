"""A small vocabulary and documents in memory, in place of the real ones."""

import types

import numpy as np


class FakeTokenizer:
  """200 pieces; ids 0..4 are special, every third id continues a word."""

  pad_id, unk_id, cls_id, sep_id, mask_id = range(5)

  def __init__(self, vocab_size=200):
    self.vocab_size = vocab_size
    self.special_ids = np.arange(5, dtype=np.int32)
    ids = np.arange(vocab_size)
    self.continues_word = (ids % 3 == 0) & (ids > 5)

  def pieces(self, ids):
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return [
      names[i] if i < 5 else ("##" if self.continues_word[i] else "") + f"w{i}"
      for i in np.asarray(ids).tolist()
    ]

  def fingerprint(self):
    return "fake"


class FakeCache:
  """Documents as lists of sentences, which are arrays of ids."""

  def __init__(self, documents, sources=None):
    self.document_sources = sources if sources is None else np.array(sources)
    self._documents = [[np.asarray(s, np.int32) for s in d] for d in documents]
    self.manifest = {"tokenizer": {"fingerprint": "fake"}}
    self.sentence_lengths = np.array(
      [len(s) for d in self._documents for s in d], np.int64
    )
    counts = [len(d) for d in self._documents]
    self.sentence_offsets = np.append(0, np.cumsum(counts)).astype(np.int64)
    self.document_lengths = np.array(
      [sum(map(len, d)) for d in self._documents], np.int64
    )

  def documents(self, indices):
    return [
      types.SimpleNamespace(tokens=np.concatenate(self._documents[i]))
      for i in indices
    ]


def random_cache(
  num_documents=300, seed=0, max_sentences=12, max_words=25, vocab_size=200
):
  """Documents of random sentences."""
  rng = np.random.default_rng(seed)
  return FakeCache(
    [
      [
        rng.integers(5, vocab_size, rng.integers(1, max_words))
        for _ in range(rng.integers(1, max_sentences))
      ]
      for _ in range(num_documents)
    ]
  )


def distinct_cache(num_documents=150, seed=0, max_sentences=9, max_words=25):
  """Every token of the corpus has an id of its own: loss is visible."""
  rng = np.random.default_rng(seed)
  documents, following = [], 5
  for _ in range(num_documents):
    sentences = []
    for _ in range(rng.integers(1, max_sentences)):
      length = int(rng.integers(1, max_words))
      sentences.append(np.arange(following, following + length))
      following += length
    documents.append(sentences)
  return FakeCache(documents), following
