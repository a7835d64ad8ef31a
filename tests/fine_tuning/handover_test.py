"""What a run takes from the one before it."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from bertjax import convert, experiment, loading, train
from bertjax.checkpoint import load_params
from bertjax.config import settings
from bertjax.handover import initial_state
from tests import tiny
from tests.fine_tuning.pretrained import FineTuningTestCase, unreported

pytestmark = pytest.mark.usefixtures("one_device")


class HandoverTest(FineTuningTestCase):
  def start(self, **changes):
    built = experiment.build(settings(self.config(**changes)))
    return initial_state(built).params, built.init().params

  def test_all_but_the_head_is_taken_or_begins_afresh_as_asked(self):
    reinit = dict(top_k=1, parameters=["^encoder/embeddings/norm/"])
    found, fresh = self.start(init_from=dict(reinit=reinit))
    old, _ = load_params(self.pretrained)
    same = functools.partial(jax.tree.map, np.testing.assert_array_equal)
    same(found["pooler"], old["pooler"])
    same(found["classifier"], fresh["classifier"])
    self.assertEqual(set(found), {"encoder", "pooler", "classifier"})
    now, new, was = (tree["encoder"] for tree in (found, fresh, old))
    same(now["embeddings"]["token"], was["embeddings"]["token"])
    same(now["embeddings"]["norm"], new["embeddings"]["norm"])
    for layer, origin in enumerate((was, new)):
      same(*(jax.tree.map(lambda x, i=layer: x[i], tree["layers"])
             for tree in (now, origin)))  # fmt: skip

  @parameterized.parameters("subword_mean", "mean", "random")
  def test_new_pieces_get_rows_and_old_ones_keep_theirs(self, start):
    tokenizer = dict(name="extended", append=["dogcat"], pad_to_multiple=8)
    found, fresh = self.start(
      init_from=dict(new_rows=start), data=dict(tokenizer=tokenizer)
    )
    table, new, old = (
      np.asarray(params["encoder"]["embeddings"]["token"]["embedding"])
      for params in (found, fresh, load_params(self.pretrained)[0])
    )
    count = len(old)
    self.assertEqual(len(table), -(-(count + 1) // 8) * 8)
    np.testing.assert_array_equal(table[:count], old)
    before = loading.load_model(self.pretrained).tokenizer
    want = {
      "random": new[count],
      "mean": old.mean(0),
      "subword_mean": old[before.encode("dogcat")].mean(0),
    }[start]
    np.testing.assert_allclose(table[count], want, atol=1e-7)

  def test_a_head_that_no_table_knows_is_not_dropped_silently(self):
    model = loading.load_model(self.pretrained)
    odd = dataclasses.replace(
      model, params={**model.params, "odd": {"bias": np.ones(3, np.float32)}}
    )
    convert.write_workdir(odd, self.root / "odd", "float32")
    with self.assertRaisesRegex(ValueError, "this model has no odd/bias"):
      self.start(init_from=dict(path=str(self.root / "odd")))

  @parameterized.named_parameters(
    (
      "another_shape",
      dict(model=dict(mlp_dim=40)),
      "pretrained does not explain .*mlp/",
    ),
    (
      "more_pieces",
      dict(data=dict(tokenizer=dict(name="extended", append=["dogcat"]))),
      "vocabulary has 96 rows, this model's 97 .*init_from.new_rows",
    ),
    (
      "another_vocabulary",
      dict(
        init_from=dict(new_rows="mean"),
        data=dict(tokenizer=dict(name="vocab_file", path="VOCAB")),
      ),
      "id 5 is 'dog' in data.tokenizer but .* must keep their ids",
    ),
    (
      "start",
      dict(init_from=dict(new_rows="median")),
      "init_from.new_rows='median' is unknown; choose from mean, random",
    ),
    (
      "nothing_new",
      dict(init_from=dict(new_rows="mean")),
      "init_from.new_rows: data.tokenizer has no piece that the model lacks",
    ),
    (
      "too_many_layers",
      dict(init_from=dict(reinit=dict(top_k=3))),
      "reinit.top_k=3 must lie between 0 and the 2 layers",
    ),
    (
      "another_objective",
      dict(objective=dict(name="span_qa")),
      "objective.name='span_qa' does not fit data.task, .*'classification'",
    ),
    (
      "other_classes",
      dict(objective=dict(num_classes=3)),
      "num_classes=3 does not fit data.task, which needs 2",
    ),
    (
      "both_paces",
      dict(evals=dict(dev=dict(every=3))),
      "evals.dev has both every",
    ),
    (
      "no_length",
      dict(stop=dict(epochs=None, wall_clock_s=9)),
      "stop.steps or stop.epochs",
    ),
  )
  def test_what_does_not_fit_is_one_clear_message(self, changes, message):
    vocabulary = self.root / "vocab.txt"
    vocabulary.write_text(
      "[PAD] [UNK] [CLS] [SEP] [MASK] dog cat".replace(" ", "\n")
    )
    changes = json.loads(json.dumps(changes).replace("VOCAB", str(vocabulary)))
    with self.assertRaisesRegex(ValueError, message):
      self.start(**changes)


# Other objectives in one run: `teachers_test.py`.
@pytest.mark.slow
class StagesTest(FineTuningTestCase):
  def test_pre_training_hands_over_to_a_task(self):
    tuning = self.config(stop=dict(epochs=1))
    config = tiny.config(self.root, stop=dict(steps=2)) | dict(
      evals={},
      stages=dict(
        pretrain={},
        tune=dict(
          init_from={}, objective=dict(name="classification"),
          **{k: tuning[k] for k in ("data", "stop", "evals")},
        ),
      )
    )  # fmt: skip
    with unreported():
      result = train.train(config, self.root / "staged")
    self.assertEqual(result.step, 2)  # stop.steps=2 comes before the epoch
    self.assertIn("dev/macro_f1", result.metrics)


if __name__ == "__main__":
  absltest.main()
