"""A stage is planned with what it would find in the folder before it."""

import pathlib

from absl.testing import absltest

from bertjax import plan as plan_lib
from bertjax.config import merge
from bertjax.data.abstract import tokenizer_size
from tests import tiny


class ContinuedTest(absltest.TestCase):
  def stages(self, **stages):
    config = tiny.config(pathlib.Path("nowhere"))
    base = {"model": {}, "data": dict(config["data"])}
    tokenizer = base["data"].pop("tokenizer")
    base["stages"] = {
      "first": dict(
        model=config["model"],
        data=dict(tokenizer=tokenizer),
        stop=dict(steps=7),
      ),
      **stages,
    }
    whole = {**config, **base}
    return {name: stage for name, stage, _ in plan_lib.stages(whole)}

  def test_model_and_tokenizer_come_from_the_stage_before(self):
    found = self.stages(
      second=dict(model=dict(dropout_rate=0.3), init_from={}), third={}
    )
    first = found["first"]
    for name in ("second", "third"):
      self.assertEqual(found[name].data["tokenizer"], first.data["tokenizer"])
    self.assertEqual(
      found["second"].model, first.model | dict(dropout_rate=0.3)
    )
    self.assertEqual(found["third"].model, found["second"].model)

  def test_what_a_stage_says_itself_stays(self):
    model = dict(name="bert", size="small")
    found = self.stages(second=dict(model=model))
    self.assertEqual(found["second"].model, model)

  def test_a_longer_vocabulary_extends_that_of_the_stage_before(self):
    longer = dict(name="extended", append=["a", "b", "c"])
    found = self.stages(second=dict(data=dict(tokenizer=longer)))
    sizes = [tokenizer_size(s.data["tokenizer"]) for s in found.values()]
    self.assertEqual(sizes, [96, 99])

  def test_a_folder_that_a_stage_names_is_asked_instead(self):
    found = self.stages(second=dict(init_from=dict(path="elsewhere")))
    self.assertEqual(found["second"].model, {})
    self.assertNotIn("tokenizer", found["second"].data)

  def test_a_frozen_model_is_that_of_the_stage_before(self):
    teacher = dict(name="point_tokenizer", vocab_size=64)
    objective = dict(name="masked_points", tokenizer={})
    data = dict(name="points", batch_size=8)
    base = merge(tiny.config(pathlib.Path("nowhere")), dict(data=data))
    base["stages"] = dict(
      first=dict(model=teacher),
      second=dict(model=dict(name="point_bert"), objective=objective),
    )
    found = {name: stage for name, stage, _ in plan_lib.stages(base)}
    self.assertEqual(found["second"].objective["tokenizer"], teacher)
    self.assertEqual(found["second"].model, dict(name="point_bert"))


if __name__ == "__main__":
  absltest.main()
