"""Point-BERT's stages hand over weights, averages and the tokenizer."""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import shutil
import tempfile

import jax
import numpy as np
import pytest
from absl.testing import absltest, parameterized

from bertjax import experiment, handover, resolve, teachers, train
from bertjax.checkpoint import load_variables
from bertjax.config import plain, settings, stage_configs
from bertjax.objectives.frozen import frozen_variables

pytestmark = pytest.mark.usefixtures("one_device", "unreported")

_CONFIG = pathlib.Path(__file__).parents[1] / "configs"


def config(folder):
  spec = importlib.util.spec_from_file_location(
    "config", _CONFIG / "point_bert_transformer.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  found = plain(module.get_config("tiny"))
  found["cache_dir"] = str(folder / "cache")
  return found


@functools.cache
def trained():
  """A folder with the three stages, each of two steps."""
  folder = pathlib.Path(tempfile.mkdtemp())

  train.train(config(folder), folder)
  return folder


def tearDownModule():
  if trained.cache_info().currsize:
    shutil.rmtree(trained())


class StagesTest(parameterized.TestCase):
  def variables(self, stage):
    return load_variables(trained() / stage)[0]

  def stage(self, name, **start):
    """Checked settings of one stage, started from a folder."""
    fields = stage_configs(config(trained()))[name]
    fields["init_from"] = {**fields["init_from"], **start}
    return settings(fields)

  def test_pre_training_keeps_the_tokenizer_that_was_trained(self):
    tokenizer = self.variables("1_tokenizer")
    (frozen,) = frozen_variables(self.variables("2_pretrain")).values()
    self.assertEqual(set(frozen), {"params", "batch_stats"})
    for collection, tree in frozen.items():
      jax.tree.map(
        np.testing.assert_array_equal,
        tree,
        {k: tokenizer[collection]["encoder"][k] for k in tree},
      )
    said = json.loads((trained() / "2_pretrain" / "config.json").read_text())
    self.assertEqual(
      said["objective"]["tokenizer"],
      {
        **json.loads((trained() / "1_tokenizer" / "config.json").read_text())[
          "model"
        ],
        "path": str(trained() / "1_tokenizer"),
      },
    )

  def test_each_stage_begins_where_the_one_before_ended(self):
    tokenizer, pretrained = map(self.variables, ("1_tokenizer", "2_pretrain"))
    for name, before, parts in (
      ("2_pretrain", tokenizer, {"patches": "embed"}),
      ("3_classify", pretrained, None),
    ):
      previous = {"2_pretrain": "1_tokenizer", "3_classify": "2_pretrain"}[name]
      made = experiment.build(self.stage(name, path=str(trained() / previous)))
      state = jax.device_get(handover.initial_state(made))
      new = {"params": state.params, "batch_stats": state.extra["batch_stats"]}
      for collection in new:
        mine = new[collection]["encoder"]["embeddings"]["patches"]
        theirs = before[collection]["encoder"]
        theirs = theirs["embed"] if parts else theirs["embeddings"]["patches"]
        jax.tree.map(np.testing.assert_array_equal, mine, theirs)
      if not parts:
        for part in ("layers", "positions", "final_norm"):
          jax.tree.map(
            np.testing.assert_array_equal,
            state.params["encoder"][part],
            before["params"]["encoder"][part],
          )
      # Averages that nothing was seen for are 0 and 1.
      self.assertGreater(
        np.abs(jax.tree.leaves(new["batch_stats"])[0]).max(), 0
      )

  def test_a_run_that_goes_on_needs_no_teacher(self):
    folder = pathlib.Path(self.create_tempdir())
    shutil.copytree(trained(), folder, dirs_exist_ok=True)
    stage = resolve.inherit(
      self.stage("2_pretrain", path=str(folder / "1_tokenizer"))
    )
    # With the schedule of before, and so its program.
    stage = dataclasses.replace(
      stage, init_from=None, horizon=stage.stop["steps"], stop={"steps": 3}
    )
    shutil.rmtree(folder / "1_tokenizer")
    result = train.run(stage, folder / "2_pretrain")
    self.assertEqual(result.step, 3)
    (frozen,) = frozen_variables(result.state.extra).values()
    kernel = frozen["params"]["embed"]["point_in"]["kernel"]
    np.testing.assert_array_equal(
      kernel,
      self.variables("1_tokenizer")["params"]["encoder"]["embed"]["point_in"][
        "kernel"
      ],
    )

  def test_missing_and_other_teachers_are_named(self):
    fields = stage_configs(config(trained()))["2_pretrain"]
    fields.pop("init_from")
    with self.assertRaisesRegex(
      ValueError, "objective.tokenizer.path is required: the workdir"
    ):
      resolve.inherit(settings(fields))
    (frozen,) = frozen_variables(self.variables("2_pretrain")).values()
    with self.assertRaisesRegex(
      ValueError, "2_pretrain has no (params|batch_stats)/"
    ):
      teachers.read_frozen(str(trained() / "2_pretrain"), frozen, "teacher")
    other = jax.tree.map(lambda x: x[..., None], frozen)
    with self.assertRaisesRegex(ValueError, r"is \(16, 16\) and \(16, 16, 1\)"):
      teachers.read_frozen(
        str(trained() / "1_tokenizer"),
        {"params": {"codebook": other["params"]["codebook"]}},
        "teacher",
      )


if __name__ == "__main__":
  absltest.main()
