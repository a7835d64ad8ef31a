"""SentencePiece models: unigram (Kudo 2018, arXiv:1804.10959) and their BPE."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece

from bertjax.data.tokenizers import base, unigram_export

# fairseq (XLM-R, CamemBERT) puts its own four rows before the model's.
_FAIRSEQ_FIRST = ("<s>", "<pad>", "</s>", "<unk>")
LAYOUTS = ("plain", "fairseq")


def _processor(
  model: bytes, where: str
) -> sentencepiece.SentencePieceProcessor:
  try:
    return sentencepiece.SentencePieceProcessor(model_proto=model)
  except RuntimeError as err:
    raise ValueError(
      f"{where} is not a SentencePiece model; copy the file again."
    ) from err


def model_pieces(model: bytes, where: str) -> list[str]:
  """Pieces of a model file's content; `where` names it in errors."""
  processor = _processor(model, where)
  return [processor.id_to_piece(i) for i in range(processor.get_piece_size())]


class SentencePieceTokenizer(base.Tokenizer):
  """A SentencePiece model plus rows that the model file does not hold."""

  backend = "sentencepiece"

  def __init__(
    self,
    model: bytes,
    specials: base.Specials = base.BERT_SPECIALS,
    *,
    tail: Sequence[str] = (),
    layout: str = "plain",
    renamed: Mapping[str, str] | None = None,
    user_tokens: Sequence[str] = (),
  ):
    """Makes a tokenizer from a model file's content.

    Args:
      model: a serialised SentencePiece model.
      specials: names of the special tokens.
      tail: pieces whose ids follow the model's: a mask, [unusedN], user tokens.
      layout: "plain" where ids are the model's; "fairseq" where the rows <s>,
        <pad>, </s>, <unk> replace the model's first three.
      renamed: model piece to the name that it has here, for reused rows.
      user_tokens: see `base.Tokenizer`.
    """
    if layout not in LAYOUTS:
      raise ValueError(f"layout={layout!r} must be one of {LAYOUTS}.")
    self._model = _processor(model, "spiece.model")
    self._content = bytes(model)
    self._layout = layout
    self._tail = list(tail)
    self._renamed = dict(renamed or {})
    size = self._model.get_piece_size()
    names = [self._model.id_to_piece(i) for i in range(size)]
    names = [self._renamed.get(n, n) for n in names]
    ids = np.arange(size, dtype=np.int32)
    if layout == "fairseq":
      names = [*_FAIRSEQ_FIRST, *names[3:]]
      ids = ids + 1
      for piece in ("<unk>", "<s>", "</s>"):
        ids[self._model.piece_to_id(piece)] = _FAIRSEQ_FIRST.index(piece)
    self._from_model = ids
    self._to_model = {int(i): m for m, i in enumerate(ids)}
    super().__init__("unigram", [*names, *self._tail], specials, user_tokens)

  def _encode_texts(self, texts: list[str]) -> list[np.ndarray]:
    encoded = self._model.encode(texts, out_type=int, num_threads=-1)
    return [self._from_model[np.array(ids, np.int32)] for ids in encoded]

  def _decode_ids(self, ids: list[int]) -> str:
    # Rows that the model does not know, or writes as nothing, go by name.
    own = {*self.special_ids.tolist(), *map(self._id.get, self.user_tokens)}
    parts, run = [], []
    for i in [*ids, None]:
      if i in self._to_model and i not in own:
        run.append(self._to_model[i])
        continue
      if run:
        parts.append(self._model.decode(run))
        run = []
      if i is not None:
        parts.append(self._pieces[i])
    return " ".join(parts)

  def _continues(self, piece: str) -> bool:
    return not piece.startswith("▁")

  def files(self) -> dict[str, bytes]:
    out = {
      "spiece.model": self._content,
      "tokenizer_config.json": base.tokenizer_config(self.specials),
    }
    if unigram_export.is_exportable(self._content):
      exported = unigram_export.to_library(
        self._content,
        self._pieces,
        self._from_model.tolist(),
        self.specials,
        self.user_tokens,
      )
      out["tokenizer.json"] = exported.to_str(pretty=True).encode()
    return out

  def options(self) -> dict[str, Any]:
    return {
      "layout": self._layout,
      "renamed": self._renamed,
      "tail": self._tail,
    }

  @classmethod
  def from_files(
    cls, files: Mapping[str, bytes], manifest: Mapping[str, Any]
  ) -> "SentencePieceTokenizer":
    return cls(
      files["spiece.model"],
      base.Specials(**manifest["specials"]),
      user_tokens=manifest["user_tokens"],
      **manifest["options"],
    )

  def with_pieces(
    self, pieces: Sequence[str], user_tokens: Sequence[str]
  ) -> "SentencePieceTokenizer":
    in_model = self.vocab_size - len(self._tail)
    renamed = dict(self._renamed)
    for i, (old, new) in enumerate(zip(self._pieces[:in_model], pieces)):
      if old != new:
        renamed[self._model.id_to_piece(self._to_model[i])] = new
    return SentencePieceTokenizer(
      self._content,
      self.specials,
      tail=pieces[in_model:],
      layout=self._layout,
      renamed=renamed,
      user_tokens=user_tokens,
    )
