r"""Uses a trained or published model: fills masks, embeds texts.

  python -m bertjax.predict fill_mask --model=runs/quickstart \
      --text="The default [MASK] is None."
  python -m bertjax.predict embed --model=FOLDER --file=texts.txt \
      --pooling=mean --normalize --output=vectors.npy

Texts come from --text (several times), --file (a text a line) or standard
input.
"""

import contextlib
import dataclasses
import functools
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from flax import linen as nn
from jaxtyping import Array, Float, Int

from bertjax import cli
from bertjax.loading import LoadedModel, load_model
from bertjax.objectives.masked_lm import gather_positions
from bertjax.registry import lookup

# Rows are padded to multiples of this, so that few shapes are compiled.
LENGTH_STEP = 32


@dataclasses.dataclass(frozen=True)
class Guess:
  """One candidate for a mask.

  Attributes:
    piece: the vocabulary's entry.
    token: its id.
    probability: among all pieces.
    text: the whole text with every mask filled by its guess of this rank.
  """

  piece: str
  token: int
  probability: float
  text: str


# Pooling of hidden states over the tokens where `valid` is 1.


def pool_cls(
  hidden: Float[Array, "b t e"], valid: Int[Array, "b t"]
) -> Float[Array, "b e"]:
  """The first token's hidden state."""
  del valid
  return hidden[:, 0].astype(jnp.float32)


def pool_mean(
  hidden: Float[Array, "b t e"], valid: Int[Array, "b t"]
) -> Float[Array, "b e"]:
  """The mean over all tokens, special ones included, summed in float32."""
  hidden = jnp.where(valid[..., None] > 0, hidden.astype(jnp.float32), 0.0)
  return hidden.sum(1) / jnp.maximum(valid.sum(1, keepdims=True), 1)


def pool_max(
  hidden: Float[Array, "b t e"], valid: Int[Array, "b t"]
) -> Float[Array, "b e"]:
  """The largest value of every feature."""
  hidden = hidden.astype(jnp.float32)
  return jnp.where(valid[..., None] > 0, hidden, -jnp.inf).max(1)


POOLING: dict[str, Callable[..., jax.Array]] = {
  "cls": pool_cls,
  "mean": pool_mean,
  "max": pool_max,
}


# Static arguments, so that all calls with one model share what is compiled.
@functools.partial(jax.jit, static_argnames=("objective", "pool"))
def _embed(
  params: Any,
  batch: dict[str, jax.Array],
  *,
  objective: nn.Module,
  pool: Callable[..., jax.Array],
) -> jax.Array:
  hidden = objective.apply({"params": params}, batch, method="encode")
  return pool(hidden, batch["segment_ids"])


@functools.partial(
  jax.jit, static_argnames=("objective", "top_k", "num_pieces")
)
def _fill(
  params: Any,
  batch: dict[str, jax.Array],
  places: jax.Array,
  *,
  objective: nn.Module,
  top_k: int,
  num_pieces: int,
) -> tuple[jax.Array, jax.Array]:
  variables = {"params": params}
  hidden = objective.apply(variables, batch, method="encode")
  masked = gather_positions(hidden, places)
  logits = objective.apply(variables, masked, method="mlm_logits")
  # Rows beyond the tokenizer's pieces pad the table for sharding.
  probabilities = jax.nn.softmax(logits[..., :num_pieces])
  return tuple(jax.lax.top_k(probabilities, top_k))


def _power_of_two(n: int) -> int:
  return 1 << max(n - 1, 0).bit_length()


def _batches(
  rows: Sequence[np.ndarray],
  batch_size: int,
  max_length: int,
  pad_id: int,
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray]]]:
  """Rows of similar length together: (their indices, padded batch).

  The last batch is filled with empty rows, up to a power of two.
  """
  order = np.argsort([len(r) for r in rows], kind="stable")
  for start in range(0, len(rows), batch_size):
    chosen = order[start : start + batch_size]
    longest = len(rows[chosen[-1]])
    length = min(-(-longest // LENGTH_STEP) * LENGTH_STEP, max_length)
    shape = (min(_power_of_two(len(chosen)), batch_size), length)
    tokens = np.full(shape, pad_id, np.int32)
    segment_ids = np.zeros(shape, np.int32)
    for i, row in enumerate(chosen):
      tokens[i, : len(rows[row])] = rows[row]
      segment_ids[i, : len(rows[row])] = 1
    yield chosen, {"tokens": tokens, "segment_ids": segment_ids}


def encode_rows(
  model: LoadedModel,
  texts: Sequence[str],
  *,
  parse_special: bool = False,
  max_length: int | None = None,
  truncate: bool = False,
) -> list[np.ndarray]:
  """[CLS] text [SEP] of every text, int32.

  Args:
    model: for its tokenizer and its longest row.
    texts: any strings.
    parse_special: whether "[MASK]" in a text is the mask.
    max_length: longest row, special tokens included; by default the model's.
    truncate: cut longer texts at their end.

  Raises:
    ValueError: no text, or one that is too long.
  """
  if isinstance(texts, str):
    raise ValueError("texts is one string; pass a list of texts.")
  if not texts:
    raise ValueError("There is no text; pass at least one.")
  if max_length is None:
    max_length = model.max_positions
  if not 3 <= max_length <= model.max_positions:
    raise ValueError(
      f"max_length={max_length} must lie between 3 and the model's"
      f" {model.max_positions} positions."
    )
  tokenizer = model.need_tokenizer()
  encoded = tokenizer.encode_batch(list(texts), parse_special=parse_special)
  rows = []
  for i, ids in enumerate(encoded):
    if len(ids) + 2 > max_length and not truncate:
      raise ValueError(
        f"Text {i} has {len(ids) + 2} tokens with {tokenizer.specials.cls} and"
        f" {tokenizer.specials.sep}; at most {max_length} fit. Shorten it, or"
        " ask for truncation (--truncate)."
      )
    ids = ids[: max_length - 2]
    rows.append(
      np.concatenate([[tokenizer.cls_id], ids, [tokenizer.sep_id]]).astype(
        np.int32
      )
    )
  return rows


def fill_mask(
  model: LoadedModel,
  texts: Sequence[str],
  top_k: int = 5,
  *,
  batch_size: int = 32,
  truncate: bool = False,
) -> list[list[list[Guess]]]:
  """The most probable pieces for every mask of every text.

  Args:
    model: with an MLM head.
    texts: each with at least one mask, spelled as in its tokenizer.
    top_k: guesses per mask, best first.
    batch_size: texts at a time.
    truncate: cut texts that are too long at their end.

  Returns:
    For each text, for each of its masks, `top_k` guesses.

  Raises:
    ValueError: a text without mask or too long, or a model without MLM head.
  """
  tokenizer = model.need_tokenizer()
  model.need_head("mlm_head", "fill_mask")
  if not 1 <= top_k <= tokenizer.vocab_size:
    raise ValueError(
      f"top_k={top_k} must lie between 1 and the vocabulary's"
      f" {tokenizer.vocab_size}."
    )
  rows = encode_rows(model, texts, parse_special=True, truncate=truncate)
  places = [np.flatnonzero(row == tokenizer.mask_id) for row in rows]
  for i, found in enumerate(places):
    if not len(found):
      raise ValueError(
        f"Text {i} ({texts[i][:60]!r}) has no {tokenizer.specials.mask}"
        + (" left after truncation." if truncate else "; mark what to guess.")
      )
  results: list[Any] = [None] * len(rows)
  for chosen, batch in _batches(
    rows, batch_size, model.max_positions, tokenizer.pad_id
  ):
    slots = _power_of_two(max(len(places[i]) for i in chosen))
    masked = np.zeros((len(batch["tokens"]), slots), np.int32)
    for row, i in enumerate(chosen):
      masked[row, : len(places[i])] = places[i]
    probabilities, tokens = jax.device_get(
      _fill(
        model.params,
        batch,
        masked,
        objective=model.objective,
        top_k=top_k,
        num_pieces=tokenizer.vocab_size,
      )
    )
    for row, i in enumerate(chosen):
      n = len(places[i])
      results[i] = _guesses(
        tokenizer, rows[i], places[i], tokens[row, :n], probabilities[row, :n]
      )
  return results


def _guesses(
  tokenizer: Any,
  row: np.ndarray,
  places: np.ndarray,
  tokens: np.ndarray,
  probabilities: np.ndarray,
) -> list[list[Guess]]:
  """Guesses of one text; `tokens` and `probabilities` are [masks, k]."""
  texts = []
  for rank in range(tokens.shape[1]):
    filled = row.copy()
    filled[places] = tokens[:, rank]
    texts.append(tokenizer.decode(filled))
  return [
    [
      Guess(piece, int(token), float(p), text)
      for piece, token, p, text in zip(
        tokenizer.pieces(ids), ids, chances, texts
      )
    ]
    for ids, chances in zip(tokens, probabilities)
  ]


def samples(model: LoadedModel, texts: Sequence[str]) -> list[tuple[str, str]]:
  """(text, best guess of each mask with its probability), for reports."""
  filled = fill_mask(model, texts, top_k=1)
  return [
    (text, ", ".join(f"{m[0].piece} ({m[0].probability:.2f})" for m in masks))
    for text, masks in zip(texts, filled)
  ]


def embed(
  model: LoadedModel,
  texts: Sequence[str],
  pooling: str = "mean",
  batch_size: int = 32,
  max_length: int | None = None,
  *,
  normalize: bool = False,
  truncate: bool = False,
) -> np.ndarray:
  """One vector a text, float32 [n, e].

  Args:
    model: any; its heads are not used.
    texts: plain texts; the spelling of a special token is mere text.
    pooling: key of `POOLING`.
    batch_size: texts at a time.
    max_length: longest row, special tokens included; by default the model's.
    normalize: scale every vector to length 1.
    truncate: cut texts that are too long at their end.

  Raises:
    ValueError: unknown pooling, or a text that is too long.
  """
  pool = lookup(POOLING, pooling, "pooling")
  rows = encode_rows(model, texts, max_length=max_length, truncate=truncate)
  vectors = np.empty((len(rows), model.spec["emb_dim"]), np.float32)
  pad_id = model.need_tokenizer().pad_id
  for chosen, batch in _batches(rows, batch_size, model.max_positions, pad_id):
    pooled = _embed(model.params, batch, objective=model.objective, pool=pool)
    vectors[chosen] = np.asarray(pooled)[: len(chosen)]
  if normalize:
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors /= np.maximum(norms, np.finfo(np.float32).tiny)
  return vectors


# The command line. Its flags are made when it runs, so that importing this
# module from another command adds none.

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16}


def _opened(path: str | None) -> contextlib.AbstractContextManager:
  """A file to write text to; standard output without a path."""
  if path is None:
    return contextlib.nullcontext(sys.stdout)
  return open(path, "w", encoding="utf-8")


def _fill_mask_command(model: LoadedModel, texts: list[str], f: Any) -> None:
  results = fill_mask(
    model, texts, f.top_k, batch_size=f.batch_size, truncate=f.truncate
  )
  with _opened(f.output) as out:
    for text, masks in zip(texts, results):
      if f.format == "json":
        guesses = [[dataclasses.asdict(g) for g in mask] for mask in masks]
        line = {"text": text, "masks": guesses}
        print(json.dumps(line, ensure_ascii=False), file=out)
        continue
      print(text, file=out)
      for i, mask in enumerate(masks):
        label = f"mask {i + 1}" if len(masks) > 1 else ""
        for guess in mask:
          print(
            f"  {label:8s}{guess.probability:8.4f}  {guess.piece:16s}"
            f"  {guess.text}",
            file=out,
          )


def _embed_command(model: LoadedModel, texts: list[str], f: Any) -> None:
  vectors = embed(
    model,
    texts,
    f.pooling,
    f.batch_size,
    f.max_length,
    normalize=f.normalize,
    truncate=f.truncate,
  )
  if f.output and f.output.endswith(".npy"):
    np.save(f.output, vectors)
    return
  with _opened(f.output) as out:
    for text, vector in zip(texts, vectors):
      # The shortest decimal of a float32 reads back as the same float32.
      values = [float(str(x)) for x in vector]
      line = {"text": text, "embedding": values}
      print(json.dumps(line, ensure_ascii=False), file=out)


Command = Callable[[LoadedModel, list[str], Any], None]

# By name: what it does, and the function that does and prints it.
TASKS: dict[str, tuple[str, Command]] = {
  "fill_mask": ("guesses for every mask", _fill_mask_command),
  "embed": ("one vector a text (.npy or JSON lines)", _embed_command),
}


def _define_flags() -> None:
  flags.DEFINE_string("model", None, "Workdir or published folder.")
  flags.DEFINE_multi_string("text", [], "A text; may be given several times.")
  flags.DEFINE_string("file", None, "File with a text a line.")
  flags.DEFINE_string("output", None, "File to write; standard output if none.")
  flags.DEFINE_integer("step", None, "Checkpoint of a workdir; the newest.")
  flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Compute dtype.")
  flags.DEFINE_integer("batch_size", 32, "Texts at a time.", lower_bound=1)
  flags.DEFINE_bool("truncate", False, "Cut texts that are too long.")
  flags.DEFINE_multi_string("ignore", [], "Regex of tensors to leave out.")
  flags.DEFINE_integer("top_k", 5, "fill_mask: guesses per mask.")
  flags.DEFINE_enum(
    "format", "table", ("table", "json"), "fill_mask: how to print."
  )
  flags.DEFINE_enum("pooling", "mean", list(POOLING), "embed: how to pool.")
  flags.DEFINE_integer("max_length", None, "embed: longest row in tokens.")
  flags.DEFINE_bool("normalize", False, "embed: vectors of length 1.")


def _texts(f: Any) -> list[str]:
  given = list(f.text)
  if f.file is not None:
    path = pathlib.Path(f.file)
    if not path.is_file():
      raise ValueError(f"--file={f.file} is not a file.")
    given += path.read_text("utf-8").splitlines()
  if not given and not sys.stdin.isatty():
    given = sys.stdin.read().splitlines()
  return [text for text in given if text.strip()]


def main(argv: list[str]) -> None:
  f = flags.FLAGS
  if len(argv) != 2 or not f.model:
    tasks = "\n".join(f"  {k:12s}{v[0]}" for k, v in TASKS.items())
    raise app.UsageError(
      f"Usage: python -m bertjax.predict TASK --model=FOLDER ...\n{tasks}"
    )
  if not f["verbosity"].present:  # Orbax tells much at the default level
    logging.set_verbosity(logging.WARNING)
  with cli.clear_errors():
    _, command = lookup(TASKS, argv[1], "task")
    texts = _texts(f)
    model = load_model(
      f.model, dtype=DTYPES[f.dtype], step=f.step, ignore=f.ignore
    )
    command(model, texts, f)


if __name__ == "__main__":
  _define_flags()
  app.run(main)
