"""What a model says of a few texts, for reports."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bertjax.data.sources import text_function
from bertjax.data.tokenizers import Tokenizer
from bertjax.interop import model_spec
from bertjax.interop.heads import default_labels
from bertjax.loading import LoadedModel
from bertjax.predict.answers import classify, tag
from bertjax.predict.fill_mask import fill_mask, masked_rows


def _filled(model: LoadedModel, texts: Sequence[str]) -> list[str]:
  """The best guess of each mask with its probability."""
  return [
    ", ".join(f"{m[0].piece} ({m[0].probability:.2f})" for m in masks)
    for masks in fill_mask(model, texts, top_k=1, truncate=True)
  ]


def _classified(model: LoadedModel, texts: Sequence[str]) -> list[str]:
  """The label with its probability, the labels, or the number."""
  shown = []
  for said in classify(model, texts, truncate=True):
    if "value" in said:
      shown.append(f"{said['value']:.3g}")
    elif "label" in said:
      shown.append(f"{said['label']} ({said['probability']:.2f})")
    else:
      shown.append(", ".join(said["labels"]) or "none")
  return shown


def _tagged(model: LoadedModel, texts: Sequence[str]) -> list[str]:
  """The words whose label is not the first, with their labels."""
  first = model.objective.labels[:1] or default_labels(1)
  return [
    ", ".join(
      f"{word} ({label})"
      for word, label in zip(said["words"], said["labels"])
      if label != first[0]
    )
    for said in tag(model, texts, truncate=True)
  ]


SAMPLERS: dict[str, Callable[[LoadedModel, Sequence[str]], list[str]]] = {
  "masked_lm": _filled,
  "classification": _classified,
  "token_classification": _tagged,
}


def check_samples(config: Mapping[str, Any], tokenizer: Tokenizer) -> None:
  """Refuses `config.samples` of which the trained model would say nothing.

  Args:
    config: of a run, completed.
    tokenizer: of its data.

  Raises:
    ValueError: a text for a masked LM without a mask, or only behind its end.
  """
  if not config["samples"] or config["objective"]["name"] != "masked_lm":
    return
  clean = text_function(config["data"].get("preprocess", ()), "data.preprocess")
  longest = model_spec.resolve(config["model"])["max_positions"]
  try:
    masked_rows(config["samples"], tokenizer, clean, longest, truncate=True)
  except ValueError as err:
    raise ValueError(f"samples: {err}") from err


def samples(model: LoadedModel, texts: Sequence[str]) -> list[tuple[str, str]]:
  """Texts with what the model says of them.

  Args:
    model: of an objective in `SAMPLERS`.
    texts: with masks for a masked LM, plain ones for others.
  """
  say = SAMPLERS[model.objective_spec["name"]]
  return list(zip(texts, say(model, texts)))
