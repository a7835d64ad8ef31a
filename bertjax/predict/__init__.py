"""Uses a trained or published model: functions, and a command.

  model = load_model("runs/sentiment")
  classify(model, ["what a film", "two hours of my life"])

Each task is a function of a `LoadedModel` and texts; `python -m
bertjax.predict` offers them all.
"""

from bertjax.predict.answers import answer, choose, classify, tag
from bertjax.predict.embed import POOLING, embed
from bertjax.predict.fill_mask import Guess, fill_mask
from bertjax.predict.samples import SAMPLERS, samples
from bertjax.predict.tokenize_points import PointTokens, tokenize_points

__all__ = [
  "POOLING",
  "SAMPLERS",
  "Guess",
  "PointTokens",
  "answer",
  "choose",
  "classify",
  "embed",
  "fill_mask",
  "samples",
  "tag",
  "tokenize_points",
]
