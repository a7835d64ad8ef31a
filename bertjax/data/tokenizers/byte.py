"""Bytes as tokens (Xue et al. 2021, arXiv:2105.13626): nothing to train."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bertjax.data.tokenizers import base, library


class ByteTokenizer(base.Tokenizer):
  """UTF-8 bytes; the id is the byte plus the number of special tokens.

  A word is, for whole-word masking, a whitespace byte and what follows it up to
  the next one, as in byte-level BPE.
  """

  backend = "bytes"

  def __init__(
    self,
    specials: base.Specials = base.BERT_SPECIALS,
    *,
    tail: Sequence[str] = (),
    user_tokens: Sequence[str] = (),
  ):
    """Makes the tokenizer.

    Args:
      specials: names of the special tokens.
      tail: pieces whose ids follow the bytes': [unusedN], user tokens.
      user_tokens: see `base.Tokenizer`.
    """
    self._tail = list(tail)
    names = specials.names()
    self._first = len(names)
    pieces = [*names, *(f"<0x{b:02X}>" for b in range(256)), *self._tail]
    super().__init__("bytes", pieces, specials, user_tokens)

  def _encode_texts(self, texts: list[str]) -> list[np.ndarray]:
    return [
      np.frombuffer(t.encode(), np.uint8).astype(np.int32) + self._first
      for t in texts
    ]

  def _decode_ids(self, ids: list[int]) -> str:
    """The text; bytes that are not UTF-8 become U+FFFD."""
    content = bytearray()
    for i in ids:
      if self._first <= i < self._first + 256:
        content.append(i - self._first)
      else:
        content += self._pieces[i].encode()
    return content.decode(errors="replace")

  def _continues(self, piece: str) -> bool:
    return int(piece[1:-1], 16) not in b" \t\n\v\f\r"

  def files(self) -> dict[str, bytes]:
    """A tokenizer.json with the same ids: byte-level BPE without merges.

    Its pieces have the library's names for bytes (`Ġ` for a space); ByT5's own
    class has other special tokens and so other ids.
    """
    letters = byte_letters()
    pieces = list(self._pieces)
    pieces[self._first : self._first + 256] = letters
    exported = library.byte_bpe(
      pieces,
      [],
      self.specials,
      user_tokens=self.user_tokens,
      mask_strips_left=False,
    )
    return {
      name: content
      for name, content in exported.files().items()
      if name in ("tokenizer.json", "tokenizer_config.json")
    }

  def options(self) -> dict[str, Any]:
    return {"tail": self._tail}

  @classmethod
  def from_files(
    cls, files: Mapping[str, bytes], manifest: Mapping[str, Any]
  ) -> "ByteTokenizer":
    return cls(
      base.Specials(**manifest["specials"]),
      user_tokens=manifest["user_tokens"],
      **manifest["options"],
    )

  def with_pieces(
    self, pieces: Sequence[str], user_tokens: Sequence[str]
  ) -> "ByteTokenizer":
    return ByteTokenizer(
      self.specials,
      tail=pieces[self._first + 256 :],
      user_tokens=user_tokens,
    )


def byte_letters() -> list[str]:
  """The printable character that byte-level BPE writes for each byte.

  Reference: Radford et al. 2019; a byte that is a printable Latin-1 character
  stands for itself, the others follow from U+0100 on.
  """
  shown = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
  others = iter(range(0x100, 0x200))
  return [chr(b) if b in shown else chr(next(others)) for b in range(256)]
