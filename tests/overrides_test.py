"""Fields of a config on the command line."""

import re

from absl.testing import absltest, parameterized
from ml_collections import ConfigDict, config_dict

from bertjax import overrides


class SeparateTest(parameterized.TestCase):
  def test_overrides_go_and_the_rest_stays_in_order(self):
    rest, found = overrides.separate(
      [
        "train",
        "--config=a.py",
        "--config.optim.name=lamb",
        "--workdir=w",
        "--config.seed",
        "-1",
        "-config.y=a=b",
        "x",
        "--",
        "--config.seed=2",
      ]
    )
    self.assertEqual(
      rest,
      ["train", "--config=a.py", "--workdir=w", "x", "--", "--config.seed=2"],
    )
    self.assertEqual(
      found, [("optim.name", "lamb"), ("seed", "-1"), ("y", "a=b")]
    )

  @parameterized.parameters(
    ([],), (["--workdir=w"],), (["--"],), (["--", "x"],)
  )
  def test_an_override_without_a_value_says_how_one_is_written(self, after):
    with self.assertRaisesRegex(
      ValueError, r"--config\.seed has no value; write --config\.seed=VALUE\."
    ):
      overrides.separate(["train", "--config.seed", *after])


class OverrideTest(parameterized.TestCase):
  @parameterized.parameters(
    ("2", 2),
    ("1e-3", 0.001),
    ("1_000", 1000),
    ("true", True),
    ("False", False),
    ("null", None),
    ("None", None),
    ('{"name": "mkor"}', {"name": "mkor"}),
    ("['a', 0.5]", ["a", 0.5]),
    ("lamb", "lamb"),
    ("runs/bert", "runs/bert"),
    ('"2"', "2"),
    ("", ""),
  )
  def test_a_value_is_what_its_text_says(self, text, expected):
    for old in (0.5, 3, "old", [], {}, None):
      for config in ({"x": old}, ConfigDict({"x": old})):
        found = overrides.override(config, [("x", text)])
        self.assertEqual(found, {"x": expected})
        self.assertIs(type(found["x"]), type(expected))

  @parameterized.parameters("{name: lamb}", "[0, 1", "[MASK]", "'x", '"')
  def test_what_lost_its_quotes_is_refused(self, text):
    with self.assertRaisesRegex(
      ValueError, rf"^--config\.x={re.escape(text)} is no JSON: "
    ):
      overrides.override({"x": "old"}, [("x", text)])

  def test_groups_on_the_way_are_made(self):
    config = ConfigDict({"optim": {"name": "lamb"}, "profile": None})
    self.assertEqual(
      overrides.override(
        config,
        [("optim.precondition.name", "mkor"), ("profile.start", "3")],
      ),
      {
        "optim": {"name": "lamb", "precondition": {"name": "mkor"}},
        "profile": {"start": 3},
      },
    )

  def test_the_last_of_a_field_counts_and_a_group_replaces(self):
    config = {"optim": {"name": "lamb", "clip_norm": 1.0}}
    given = [
      ("optim.name", "sgd"),
      ("optim", '{"name": "adamw"}'),
      ("optim.learning_rate", "1"),
      ("optim.learning_rate", "2"),
    ]
    self.assertEqual(
      overrides.override(config, given),
      {"optim": {"name": "adamw", "learning_rate": 2}},
    )

  def test_brackets_count_in_lists(self):
    for kind in (list, tuple):
      config = {"sources": kind([{"weight": 1}, {"weight": 1}])}
      for given in (config, ConfigDict(config)):
        self.assertEqual(
          overrides.override(given, [("sources[1].weight", "0.5")]),
          {"sources": kind([{"weight": 1}, {"weight": 0.5}])},
        )

  def test_the_config_itself_is_left_alone(self):
    config = {"optim": {"name": "lamb"}}
    overrides.override(config, [("optim.name", "sgd")])
    self.assertEqual(config, {"optim": {"name": "lamb"}})

  def test_fields_that_refer_to_another_follow_it(self):
    config = ConfigDict({"seq_len": 128})
    config.max_masked = config.get_ref("seq_len") // 8
    self.assertEqual(
      overrides.override(config, [("seq_len", "512")]),
      {"seq_len": 512, "max_masked": 64},
    )

  def test_a_placeholder_is_filled(self):
    config = ConfigDict({"data_dir": config_dict.placeholder(str)})
    self.assertEqual(
      overrides.override(config, [("data_dir", "here")]), {"data_dir": "here"}
    )

  @parameterized.parameters(
    ("seed.x", "seed=0 has no fields"),
    ("sources[5].x", r"sources\[5\] is not there; there are 1"),
    ("sources[1]", r"sources\[1\] is not there; there are 1"),
    ("sources.x", r"sources=\[{}\] has no field 'x'; write sources\[0\]"),
    ("seed[0]", "seed=0 has no fields"),
    ("model[0]", r"model={} is no list"),
  )
  def test_a_way_that_leads_nowhere_is_named(self, field, message):
    config = {"seed": 0, "sources": [{}], "model": {}}
    for given in (config, ConfigDict(config)):
      with self.assertRaisesRegex(ValueError, message):
        overrides.override(given, [(field, "3")])


if __name__ == "__main__":
  absltest.main()
