"""Uses a trained or published model: functions, and a command.

  model = load_model("runs/sentiment")
  classify(model, ["what a film", "two hours of my life"])

Each task is a function of a `LoadedModel` and texts, or clouds of points;
`python -m bertjax.predict` offers them all.
"""

from bertjax.predict.answers import answer, choose, classify, tag
from bertjax.predict.classify_points import classify_points
from bertjax.predict.embed import POOLING, embed
from bertjax.predict.fill_mask import Guess, fill_mask
from bertjax.predict.samples import SAMPLERS, check_samples, samples
from bertjax.predict.segment_points import segment_points
from bertjax.predict.tokenize_points import PointTokens, tokenize_points

__all__ = [
  "POOLING",
  "SAMPLERS",
  "Guess",
  "PointTokens",
  "answer",
  "check_samples",
  "choose",
  "classify",
  "classify_points",
  "embed",
  "fill_mask",
  "samples",
  "segment_points",
  "tag",
  "tokenize_points",
]
