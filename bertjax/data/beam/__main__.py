r"""Prepares a config's text with Apache Beam, on one machine or a cluster.

  python -m bertjax.data.beam cache --config=configs/bert.py:base --stage=phase1
  python -m bertjax.data.beam statistics --config=... --output=statistics.json
  python -m bertjax.data.beam vocabulary --config=... --output=FOLDER

`cache` makes the token cache that `bertjax.train` would make with this config,
where it then finds it. `statistics` prints sizes and duplicates of a split.
`vocabulary` trains what `data.tokenizer` says on all of the text. Flags after
`--` are Beam's:

  ... --readers=8 -- --direct_num_workers=8 \
      --direct_running_mode=multi_processing
  ... --readers=100 --shared=gs://BUCKET/FOLDER -- --runner=DataflowRunner \
      --project=... --setup_file=./setup.py

Workers exchange files in `cache_dir`, which they must see under one path, or in
`--shared`: any URL that Beam writes to (gs:// needs apache-beam[gcp]). Shards
that were made there are copied to `cache_dir`, which is local, and stay there
until you remove them, so that the same command brings the cache to another
machine.
"""

import functools
import json
import pathlib
from collections.abc import Sequence
from typing import Any

from absl import app, flags

from bertjax import cli, config, registry, resolve
from bertjax.config import Settings
from bertjax.data import cache_shards
from bertjax.data.beam import cache, statistics, vocabulary
from bertjax.data.beam.pipeline import pipeline_options
from bertjax.data.sources import SOURCES, Preprocessed
from bertjax.data.text import TextData
from bertjax.experiment import build_data

_BLOCK = 1024  # documents that one reader of `statistics` takes at a time


def _text_data(settings: Settings) -> TextData:
  data = build_data(
    settings.data, seed=settings.seed, cache_dir=settings.cache_path
  )
  if not isinstance(data, TextData):
    raise ValueError(
      f"data.name={settings.data.get('name')!r} reads no documents; only"
      " data.name='text' has them."
    )
  return data


def _cache(settings: Settings, given: flags.FlagValues, options: Any) -> None:
  data = _text_data(settings)
  made = data.cache(
    given.split or data.train_split,
    functools.partial(
      cache.make_shards,
      readers=given.readers,
      options=options,
      shared=given.shared,
    ),
  )
  print(
    f"{made.path}: {made.num_documents} documents, {made.num_tokens} tokens,"
    f" {made.duplicates} duplicates dropped"
  )


def _statistics(
  settings: Settings, given: flags.FlagValues, options: Any
) -> None:
  cli.check_output("output", given.output)
  data = _text_data(settings)
  split = given.split or data.train_split
  found = statistics.corpus_statistics(
    cache_shards.Job(
      source=data.source,
      split=split,
      tokenizer=data.tokenizer,
      splitter=data.splitter,
      max_tokens_per_document=None,
      documents_per_shard=_BLOCK,
    ),
    given.shared or str(settings.cache_path),
    readers=given.readers,
    options=options,
    threshold=given.threshold,
  )
  for name, value in found.items():
    print(f"{name:<15}  {value}")
  if given.output is not None:
    text = json.dumps({"split": split, **found}, indent=2)
    pathlib.Path(given.output).write_text(text + "\n", encoding="utf-8")


def _vocabulary(
  settings: Settings, given: flags.FlagValues, options: Any
) -> None:
  if given.output is None:
    raise ValueError("--output is required: the folder of the vocabulary.")
  spec = dict(settings.data.get("tokenizer", {}))
  if spec.pop("name", None) != "train":
    raise ValueError(
      "data.tokenizer must be dict(name='train', kind=..., ...) to say which"
      " vocabulary is trained."
    )
  # As `TOKENIZERS["train"]`, which may name a source of its own.
  own, split = spec.pop("source", None), spec.pop("split", None) or "train"
  where = "data.source" if own is None else "data.tokenizer.source"
  source = registry.build(SOURCES, own or settings.data["source"], where)
  if own is None:
    split = given.split or settings.data.get("train_split", "train")
    if preprocess := settings.data.get("preprocess"):
      source = Preprocessed(source, preprocess, "data.preprocess")
  trained = vocabulary.train_vocabulary(
    spec.pop("kind", None),
    source,
    split,
    given.shared or str(settings.cache_path),
    readers=given.readers,
    pipeline=options,
    **spec,
  )
  trained.save(given.output)
  print(
    f"{trained.vocab_size} pieces; use them with data.tokenizer ="
    f" dict(name='folder', path={given.output!r})"
  )


COMMANDS = {
  "cache": _cache,
  "statistics": _statistics,
  "vocabulary": _vocabulary,
}


def _settings(given: flags.FlagValues) -> Settings:
  stages = config.stage_configs(cli.config())
  if given.stage is None and len(stages) > 1:
    raise ValueError(f"--stage is required: one of {', '.join(stages)}.")
  if given.stage is not None:
    stages = {given.stage: registry.lookup(stages, given.stage, "stage")}
  (chosen,) = stages.values()
  return resolve.inherit(config.settings(chosen))


def main(argv: Sequence[str]) -> None:
  given = flags.FLAGS
  if len(argv) < 2 or not given["config"].present:
    raise app.UsageError(
      f"Usage: python -m bertjax.data.beam {'|'.join(COMMANDS)} --config=FILE"
      " [-- flags of Beam]"
    )
  cli.quiet()
  with cli.clear_errors():
    run = registry.lookup(COMMANDS, argv[1], "command")
    options = pipeline_options(argv[2:])
    run(_settings(given), given, options)


def _define_flags() -> None:
  cli.define_config()
  flags.DEFINE_string("stage", None, "Which stage of a config with stages.")
  flags.DEFINE_string(
    "split", None, "Split of the source; data.train_split if unset."
  )
  flags.DEFINE_integer(
    "readers", 1, "Workers that read at the same time.", lower_bound=1
  )
  flags.DEFINE(
    cli.PATH,
    "shared",
    None,
    "Folder or URL that all workers see; cache_dir if unset.",
  )
  flags.DEFINE(
    cli.PATH, "output", None, "statistics: JSON file. vocabulary: folder."
  )
  flags.DEFINE_float(
    "threshold", 0.8, "statistics: overlap of near-duplicates, 0..1."
  )


if __name__ == "__main__":
  _define_flags()
  cli.run(main, flags_parser=cli.parse_flags)
