"""Point-BERT's full configurations are the authors', number by number."""

import dataclasses
import functools

import jax
import numpy as np
from absl.testing import absltest, parameterized

from bertjax import optim, train_state
from bertjax.config import settings
from bertjax.data.points import abstract_points
from bertjax.experiment import build_objective
from bertjax.interop import point_bert
from bertjax.optim import selection
from configs import point_bert as tokenizer_configs
from configs import point_bert_transformer as configs
from tests.interop import released_point_bert as released


@functools.cache
def fields(variant):
  if variant == "dvae":
    return settings(tokenizer_configs.get_config(variant))
  return settings(configs.get_config(variant))


class ConfigsTest(parameterized.TestCase):
  # Clouds of the training lists, and epochs of them and of the warm-up.
  @parameterized.parameters(
    ("dvae", 41_952, 64, 300, 10, 5e-4, 64, 1024),
    ("pretrain", 52_470, 128, 300, 3, 0.05, 64, 1024),
    ("classify", 9_843, 32, 300, 10, 0.05, 64, 1024),
    ("classify_4k", 9_843, 32, 300, 10, 0.05, 256, 4096),
    ("classify_8k", 9_843, 32, 300, 10, 0.05, 512, 8192),
    ("scratch", 9_843, 32, 300, 10, 0.05, 64, 1024),
    ("scans", 11_416, 32, 300, 10, 0.05, 64, 1024),
    ("few_shot", 50, 32, 150, 10, 0.05, 64, 1024),
    ("segment", 14_007, 16, 300, 10, 0.05, 128, 2048),
  )
  def test_sizes_and_schedules(
    self, variant, clouds, batch, epochs, warmup, decay, patches, num_points
  ):
    stage = fields(variant)
    self.assertEqual(stage.data["batch_size"], batch)
    self.assertEqual(stage.model["patches"], patches)
    self.assertEqual(stage.model["patch_size"], 32)
    self.assertEqual(stage.data["num_points"], num_points)
    self.assertEqual(stage.optim["weight_decay"], decay)
    epoch = -(-clouds // batch)
    if "epochs" in stage.stop:
      self.assertEqual(stage.stop["epochs"], epochs)
      last = epochs * epoch
    else:
      last = stage.stop["steps"]
      self.assertEqual(last, epochs * epoch)
    made = optim.build_optimizer(
      dict(stage.optim, no_decay=()),
      total_steps=last,
      params={"kernel": jax.ShapeDtypeStruct((2,), "float32")},
    )
    for step, rate in (
      (0, 0.0), (warmup * epoch // 2, 2.5e-4), (warmup * epoch, 5e-4),
      (last, 1e-6),
    ):  # fmt: skip
      self.assertAlmostEqual(float(made.schedule(step)), rate, delta=3e-6)
    clips = variant not in ("dvae", "pretrain", "segment")
    self.assertEqual(stage.optim.get("clip_norm"), 10 if clips else None)

  @parameterized.parameters(
    ("classify", 1200), ("classify_4k", 4800), ("classify_8k", 8192),
    ("scans", 1200), ("few_shot", 1200),
  )  # fmt: skip
  def test_rows_are_drawn_of_farthest_points(self, variant, stored):
    data = fields(variant).data
    self.assertEqual(
      (data["stored_points"], data["farthest"], data["draw"]),
      (stored, True, "subset"),
    )
    self.assertEqual(data["draw_eval"], "first")
    self.assertEqual(data.get("unit_sphere", True), variant != "scans")

  def test_clouds_are_scaled_and_shifted_but_for_the_tokenizer(self):
    for variant in ("pretrain", "classify", "scans", "few_shot", "segment"):
      self.assertEqual(
        fields(variant).data["augment"], ({"name": "scale_shift"},)
      )
    self.assertNotIn("augment", fields("dvae").data)
    self.assertEqual(fields("pretrain").data["train_split"], "all")

  @parameterized.parameters(
    ("dvae", "tokenizer"), ("pretrain", "pretrained"),
    ("classify", "classifier"), ("segment", "segmenter"),
  )  # fmt: skip
  def test_decay_spares_what_the_authors_spare(self, variant, kind):
    stage = fields(variant)
    data = abstract_points(stage.data)
    model = dict(stage.model)
    if variant != "dvae":
      model["attend"] = "reference"  # "flash" traces kernels
    stage = dataclasses.replace(
      stage, model=model, objective=data.objective(stage.objective)
    )
    objective = build_objective(stage, data)
    params, _ = train_state.abstract_params(objective, data.batch_spec(2))
    rule = stage.optim.get("no_decay", selection.is_bias_or_norm)
    spared = selection.select(rule, params, "no_decay")
    marks = jax.tree.map(
      lambda x, s: np.broadcast_to(np.float32(s), x.shape), params, spared
    )
    found = point_bert.to_theirs(
      {"params": marks},
      point_bert.KINDS[kind].table,
      num_layers=getattr(objective.encoder, "num_layers", 0),
    )
    shapes = released.SHAPES[kind]
    self.assertGreater(len(found), 50)
    for name, mark in found.items():
      theirs = (
        len(shapes[name]) == 1 or name.endswith(".bias") or "token" in name
      )
      self.assertEqual(set(np.unique(mark)), {float(theirs)}, name)


if __name__ == "__main__":
  absltest.main()
