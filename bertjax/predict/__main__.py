r"""Uses a trained or published model from the command line.

  python -m bertjax.predict fill_mask --model=runs/quickstart \
      --text="The default [MASK] is None."
  python -m bertjax.predict embed --model=FOLDER --file=texts.txt \
      --pooling=mean --normalize --output=vectors.npy
  python -m bertjax.predict tokenize_points --model=runs/dvae \
      --input=chair.obj --reconstruction=chair.ply
  python -m bertjax.predict classify_points --model=runs/modelnet40 \
      --input=chair.obj --votes=10
  python -m bertjax.predict segment_points --model=runs/parts \
      --input=chair.obj --category=Chair --output=parts.ply
  python -m bertjax.predict classify --model=runs/sentiment --file=texts.txt
  python -m bertjax.predict answer --model=runs/squad \
      --text="Who wrote it?" --pair="Ada wrote the notes."

Texts come from --text (several times), --file (a text a line, or a .jsonl file
of objects) or standard input; second texts, such as contexts, from --pair (as
often as --text). An empty text is refused, so that answers stand in the lines
of their texts. Objects have the fields text, pair (classify), text or words
(tag), question, context (answer), text, endings (choose). Classes, tags,
answers, choices, codes and parts of points are written as JSON lines. Point
clouds come from --input (as often as one likes): arrays (.npy), tables (.txt,
.xyz...) or meshes (.obj, .off...). Parts of one cloud are also written beside
its points, as rows x y z part (.npy) or vertices (.ply).
"""

import contextlib
import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags

from bertjax import cli
from bertjax.loading import LoadedModel, load_model
from bertjax.models import DTYPES
from bertjax.predict import clouds as clouds_lib
from bertjax.predict.answers import REQUESTS
from bertjax.predict.classify_points import classify_points
from bertjax.predict.embed import POOLING, embed
from bertjax.predict.fill_mask import fill_mask
from bertjax.predict.requests import Field, Request, requests_of
from bertjax.predict.segment_points import segment_points
from bertjax.predict.tokenize_points import tokenize_points
from bertjax.registry import lookup


def _opened(path: str | None) -> contextlib.AbstractContextManager:
  """A file to write text to; standard output without a path."""
  if path is None:
    return contextlib.nullcontext(sys.stdout)
  return open(path, "w", encoding="utf-8")


def _ending(path: str | None) -> str:
  return pathlib.Path(path or "").suffix.lower()


def _print_json(line: Any, out: Any) -> None:
  print(json.dumps(line, ensure_ascii=False), file=out)


def _texts(requests: list[Request]) -> list[str]:
  return [request["text"] for request in requests]


def _fill_mask(model: LoadedModel, requests: list[Request], f: Any) -> None:
  texts = _texts(requests)
  results = fill_mask(
    model, texts, f.top_k, batch_size=f.batch_size, truncate=f.truncate
  )
  with _opened(f.output) as out:
    for text, masks in zip(texts, results):
      if f.format == "json":
        guesses = [[dataclasses.asdict(g) for g in mask] for mask in masks]
        _print_json({"text": text, "masks": guesses}, out)
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


def _embed(model: LoadedModel, requests: list[Request], f: Any) -> None:
  texts = _texts(requests)
  vectors = embed(
    model,
    texts,
    f.pooling,
    f.batch_size,
    f.max_length,
    normalize=f.normalize,
    truncate=f.truncate,
  )
  if _ending(f.output) == ".npy":
    with open(f.output, "wb") as out:  # by its path, .NPY would get another
      np.save(out, vectors)
    return
  with _opened(f.output) as out:
    for text, vector in zip(texts, vectors):
      # The shortest decimal of a float32 reads back as the same float32.
      values = [float(str(x)) for x in vector]
      _print_json({"text": text, "embedding": values}, out)


def _ask(task: str) -> Callable[[LoadedModel, list[Request], Any], None]:
  def run(model: LoadedModel, requests: list[Request], f: Any) -> None:
    fields, ask = REQUESTS[task]
    used = [field.name for field in fields if field.name in requests[0]]
    columns = [[r[name] for r in requests] for name in used]
    options = {"null": f.null_answer} if task == "answer" else {}
    said = ask(
      model, *columns, batch_size=f.batch_size, truncate=f.truncate, **options
    )
    with _opened(f.output) as out:
      for request, reply in zip(requests, said):
        _print_json(request | reply, out)

  return run


def _clouds(model: LoadedModel, f: Any) -> list[np.ndarray]:
  count = clouds_lib.points_to_sample(model)
  return [clouds_lib.read_cloud(path, count) for path in f.input]


def _check_one(paths: list[str], flag: str) -> None:
  if len(paths) > 1:
    raise ValueError(
      f"{flag} holds one cloud, and --input is given {len(paths)} times."
    )


def _tokenize_points(
  model: LoadedModel, requests: list[Request], f: Any
) -> None:
  del requests  # clouds are no text
  if f.reconstruction:
    _check_one(f.input, f"--reconstruction={f.reconstruction}")
  found = tokenize_points(model, _clouds(model, f), batch_size=f.batch_size)
  with _opened(f.output) as out:
    for path, tokens in zip(f.input, found):
      line = {"input": path, "codes": tokens.codes.tolist()}
      _print_json(line | {"centres": tokens.centres.tolist()}, out)
  if f.reconstruction:
    clouds_lib.write_cloud(f.reconstruction, found[0].points)


def _classify_points(
  model: LoadedModel, requests: list[Request], f: Any
) -> None:
  del requests
  found = classify_points(
    model, _clouds(model, f), votes=f.votes, batch_size=f.batch_size
  )
  with _opened(f.output) as out:
    for path, said in zip(f.input, found):
      _print_json({"input": path} | said, out)


def _segment_points(
  model: LoadedModel, requests: list[Request], f: Any
) -> None:
  del requests
  if f.category is None:
    raise ValueError("--category is missing: the name of what --input shows.")
  as_cloud = _ending(f.output) in clouds_lib.WRITTEN
  if as_cloud:
    _check_one(f.input, f"--output={f.output}")
  clouds = _clouds(model, f)
  found = segment_points(model, clouds, f.category, batch_size=f.batch_size)
  if as_cloud:
    clouds_lib.write_cloud(f.output, clouds[0], found[0])
    return
  with _opened(f.output) as out:
    for path, parts in zip(f.input, found):
      _print_json({"input": path, "parts": parts.tolist()}, out)


Command = Callable[[LoadedModel, list[Request], Any], None]

# By name: what it does, the fields of a request (none if it takes no text), and
# what does and prints it.
_TEXT = (Field("text"),)
TASKS: dict[str, tuple[str, tuple[Field, ...], Command]] = {
  "fill_mask": ("guesses for every mask", _TEXT, _fill_mask),
  "embed": ("one vector a text (.npy or JSON lines)", _TEXT, _embed),
  "classify": (
    "labels with probabilities", REQUESTS["classify"][0], _ask("classify")
  ),
  "tag": ("a label for every word", REQUESTS["tag"][0], _ask("tag")),
  "answer": ("a span of the context", REQUESTS["answer"][0], _ask("answer")),
  "choose": ("the right ending", REQUESTS["choose"][0], _ask("choose")),
  "tokenize_points": ("codes of a cloud's patches", (), _tokenize_points),
  "classify_points": ("the class of a cloud", (), _classify_points),
  "segment_points": ("a part for every point of a cloud", (), _segment_points),
}  # fmt: skip

# Flags that not all tasks read, by the tasks that do.
_TEXT_FLAGS = ("text", "pair", "file", "truncate")
FLAGS_OF = {
  "fill_mask": (*_TEXT_FLAGS, "top_k", "format"),
  "embed": (*_TEXT_FLAGS, "pooling", "max_length", "normalize"),
  "classify": _TEXT_FLAGS,
  "tag": _TEXT_FLAGS,
  "answer": (*_TEXT_FLAGS, "null_answer"),
  "choose": _TEXT_FLAGS,
  "tokenize_points": ("input", "reconstruction"),
  "classify_points": ("input", "votes"),
  "segment_points": ("input", "category"),
}


def usage() -> str:
  """What `--help` prints above the flags."""
  tasks = "\n".join(f"  {name:17s}{what}" for name, (what, *_) in TASKS.items())
  return f"{__doc__}\nTasks:\n{tasks}\n"


def _define_flags() -> None:
  """Made when the command runs, so that importing adds none."""
  flags.DEFINE(cli.PATH, "model", None, cli.MODEL)
  flags.DEFINE_multi_string(
    "text", [], "A text, not empty; as often as needed."
  )
  flags.DEFINE_multi_string("pair", [], "The second text of each --text.")
  flags.DEFINE(
    cli.PATH,
    "file",
    None,
    "File with a text a line, or .jsonl; without empty lines.",
  )
  flags.DEFINE(
    cli.PATH, "output", None, "File to write; standard output if none."
  )
  flags.DEFINE_integer(
    "step",
    None,
    "Checkpoint of a workdir; the best by keep.best_metric, or the newest.",
  )
  flags.DEFINE_enum("dtype", "float32", list(DTYPES), "Compute dtype.")
  flags.DEFINE_integer(
    "batch_size", 32, "Texts or clouds at a time.", lower_bound=1
  )
  flags.DEFINE_bool("truncate", False, "Cut texts that are too long.")
  flags.DEFINE_multi_string("ignore", [], "Regex of tensors to leave out.")
  flags.DEFINE_integer("top_k", 5, "fill_mask: guesses per mask.")
  flags.DEFINE_enum(
    "format", "table", ("table", "json"), "fill_mask: how to print."
  )
  flags.DEFINE_enum("pooling", "mean", list(POOLING), "embed: how to pool.")
  flags.DEFINE_integer("max_length", None, "embed: longest row in tokens.")
  flags.DEFINE_bool("normalize", False, "embed: vectors of length 1.")
  flags.DEFINE_bool("null_answer", None, "answer: may there be no answer?")
  flags.DEFINE_multi(
    cli.PATH,
    flags.ArgumentSerializer(),
    "input",
    [],
    "..._points: a cloud or mesh.",
  )
  flags.DEFINE_integer(
    "votes", 0, "classify_points: random views; 0: that of an evaluation.",
    lower_bound=0,
  )  # fmt: skip
  flags.DEFINE_string("category", None, "segment_points: what is shown.")
  flags.DEFINE(
    cli.PATH,
    "reconstruction",
    None,
    "tokenize_points: file of the decoded points.",
  )


def main(argv: list[str]) -> None:
  f = flags.FLAGS
  if len(argv) != 2 or not f.model:
    raise app.UsageError(
      "Usage: python -m bertjax.predict TASK --model=FOLDER ..."
    )
  cli.quiet()
  cli.keep_compiled()
  with cli.clear_errors():
    _, fields, command = lookup(TASKS, argv[1], "task")
    cli.refuse_others(argv[1], FLAGS_OF, f)
    cli.check_output("output", f.output)
    cli.check_output("reconstruction", f.reconstruction, clouds_lib.WRITTEN)
    requests = requests_of(f, fields) if fields else []
    model = load_model(
      f.model, dtype=DTYPES[f.dtype], step=f.step, ignore=f.ignore
    )
    command(model, requests, f)


if __name__ == "__main__":
  __doc__ = usage()
  _define_flags()
  cli.run(main)
