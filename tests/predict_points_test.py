"""Clouds from files get the classes and parts that the model gives its rows."""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import types
from unittest import mock

import jax
import numpy as np
from absl.testing import absltest, parameterized
from scipy import special

from bertjax import experiment, loading
from bertjax.config import settings
from bertjax.convert import write_workdir
from bertjax.data.shapes.procedural import normalised
from bertjax.predict import (
  classify_points,
  embed,
  fill_mask,
  segment_points,
  tokenize_points,
)
from bertjax.predict.__main__ import TASKS
from bertjax.predict.clouds import (
  points_to_sample,
  read_cloud,
  reading_of,
  write_cloud,
)

N, STORED = 40, 60
FAR = (612345.25, 4512345.5, 10)  # where float32 has steps of half a metre
CLASSES = ("box", "cone", "torus")


def config(objective, **data):
  data = dict(
    name="points",
    source=dict(
      name="procedural",
      classes=CLASSES,
      points=90,
      sizes=dict(train=6, test=6),
    ),
    num_points=N,
    stored_points=STORED,
    farthest=True,
    draw="subset",
    draw_eval="first",
    augment=(dict(name="scale_shift"),),
    batch_size=6,
    **data,
  )
  model = dict(
    name="point_bert",
    patches=7,
    patch_size=5,
    num_layers=3,
    emb_dim=12,
    num_heads=2,
    patch_features=8,
    shrink=8,
    attend="reference",
  )
  return dict(
    model=model,
    objective=objective,
    data=data,
    optim=dict(name="adamw", learning_rate=1e-3),
    stop=dict(steps=1),
    mesh=dict(data=1),
  )


def save(fields, folder):
  """A workdir of a model that is not trained, and its data."""
  built = experiment.build(settings(fields), devices=jax.devices()[:1])
  state = built.init()
  # Far from 0, so that clouds and points differ in what is said of them.
  params = jax.tree.map(lambda x: 6 * x, state.params)
  made = loading.LoadedModel(
    objective=built.objective,
    params=params,
    tokenizer=None,
    spec=built.settings.model,
    objective_spec=built.settings.objective,
    origin="workdir",
    config=dict(data=dict(built.settings.data)),
    path=str(folder),
    extra=state.extra,
  )
  write_workdir(made, folder, "float32")
  return built.data


class PredictPointsTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.root = pathlib.Path(
      cls.enterClassContext(tempfile.TemporaryDirectory())
    )
    cache = {"BERTJAX_CACHE": str(cls.root / "cache")}
    cls.enterClassContext(mock.patch.dict(os.environ, cache))
    cls.data = save(
      config(dict(name="point_classification")), cls.root / "classes"
    )
    levels = dict(name="part_segmentation", levels=(20, 11))
    cls.parted = save(config(levels, parts=True), cls.root / "parts")
    cls.classes = loading.load_model(cls.root / "classes")
    cls.parts = cls.evened(loading.load_model(cls.root / "parts"))
    cls.clouds = [cloud.points for cloud in cls.data.source.open("test")]

  @classmethod
  def box(cls):
    """The evaluation's row of a box, which has three parts."""
    (batch,) = cls.parted.dataset("test").evaluation_batches(6)
    chosen = np.flatnonzero(batch["category"] == 0)[:1]
    return {k: x[chosen] for k, x in batch.items()}

  @classmethod
  def evened(cls, model):
    """Of the box no part is the likeliest everywhere."""
    mean = cls.logits(model, cls.box()).mean((0, 1))
    params = jax.tree_util.tree_map_with_path(
      lambda path, x: (
        x - mean
        if jax.tree_util.keystr(path, simple=True, separator="/")
        == "segmenter/classes/bias"
        else x
      ),
      model.params,
    )
    return dataclasses.replace(model, params=params)

  @staticmethod
  def logits(model, batch):
    return np.asarray(
      jax.jit(lambda b: model.objective.apply(
        model.variables, b, method="logits"
      ))(batch)
    )  # fmt: skip

  def test_a_cloud_is_read_as_an_evaluation_reads_it(self):
    (batch,) = self.data.dataset("test").evaluation_batches(6)
    chances = special.softmax(
      self.logits(self.classes, {"points": batch["points"]}), axis=1
    )
    self.assertGreater(np.ptp(chances, axis=0).max(), 0.01)  # clouds differ
    found = classify_points(self.classes, self.clouds, batch_size=4)
    for row, number in zip(chances, batch["index"]):
      said = found[int(number)]
      self.assertEqual(list(said["probabilities"]), list(CLASSES))
      np.testing.assert_allclose(
        list(said["probabilities"].values()), row, atol=1e-5
      )
      self.assertEqual(said["label"], CLASSES[row.argmax()])
      self.assertEqual(said["probability"], max(said["probabilities"].values()))

  def test_where_a_scan_lies_changes_nothing(self):
    for name, shift in (("near.xyz", (0, 0, 0)), ("far.xyz", FAR)):
      np.savetxt(self.root / name, self.clouds[0] + np.array(shift))
    near, far = classify_points(
      self.classes,
      [read_cloud(self.root / f"{x}.xyz", 5) for x in ("near", "far")],
    )
    np.testing.assert_allclose(
      list(far["probabilities"].values()),
      list(near["probabilities"].values()),
      atol=1e-5,  # as float64 rounds so far out
    )

  def test_votes_are_the_mean_over_views_as_in_training(self):
    cloud = self.data.clouds("test")[0].points  # the farthest come first
    reading = self.data.reading
    rng = np.random.default_rng(0)
    rows = np.stack([reading.drawn(cloud, rng)[0] for _ in range(5)])
    logits = self.logits(self.classes, {"points": rows.astype(np.float32)})
    self.assertGreater(np.ptp(logits, axis=0).max(), 0.01)  # views differ
    (said,) = classify_points(self.classes, self.clouds[:1], votes=5)
    np.testing.assert_allclose(
      list(said["probabilities"].values()),
      special.softmax(logits.mean(0)),
      atol=1e-5,
    )
    with self.assertRaisesRegex(ValueError, "votes=-1 must not be negative"):
      classify_points(self.classes, self.clouds, votes=-1)

  def test_points_have_the_likeliest_part_of_their_category(self):
    box = self.box()
    own = np.array(self.parted.about.class_parts[0])
    (logits,) = self.logits(self.parts, box)
    self.assertGreater(len(set(logits.argmax(-1)) - set(own)), 0)
    wanted = own[logits[:, own].argmax(-1)]
    self.assertGreater(len(set(wanted)), 1)
    number = int(box["index"][0])
    cloud = self.clouds[number]
    (found,) = segment_points(self.parts, [cloud], "box")
    self.assertEqual(found.shape, (90,))
    # Points that were drawn, where they are in the cloud; others follow them.
    source = self.parted.clouds("test")[number].points[:N]
    np.testing.assert_allclose(normalised(source), box["points"][0], atol=1e-5)
    gaps = np.linalg.norm(cloud[:, None] - source, axis=-1)
    np.testing.assert_array_equal(found, wanted[gaps.argmin(1)])

  def test_a_category_must_be_one_of_the_models(self):
    with self.assertRaisesRegex(ValueError, "category='cube' is unknown.*box"):
      segment_points(self.parts, self.clouds, "cube")

  @parameterized.parameters(
    (classify_points, "parts", "made for 'part_segmentation'.*'point_class"),
    (tokenize_points, "classes", "made for 'point_classification'"),
  )
  def test_other_models_are_refused(self, task, model, message):
    with self.assertRaisesRegex(ValueError, message):
      task(getattr(self, model), self.clouds)
    with self.assertRaisesRegex(ValueError, "There is no cloud"):
      classify_points(self.classes, [])
    with self.assertRaisesRegex(ValueError, "batch_size=0 must be at least 1"):
      classify_points(self.classes, self.clouds, batch_size=0)

  @parameterized.parameters(embed, fill_mask)
  def test_tasks_of_texts_say_what_the_model_is_for(self, task):
    with self.assertRaisesRegex(
      ValueError, "clouds of points, not texts; it is for classify_points"
    ):
      task(self.classes, ["a [MASK]"])

  def test_clouds_of_less_than_their_patches_are_refused(self):
    few = self.clouds[0][:6]
    self.assertLen(classify_points(self.classes, [self.clouds[0][:7]]), 1)
    with self.assertRaisesRegex(
      ValueError, "Cloud 1 has 6 points, too few .*, which takes 7"
    ):
      classify_points(self.classes, [self.clouds[0], few])
    few = self.clouds[0][:19]  # enough for its patches, but not for its levels
    with self.assertRaisesRegex(
      ValueError, "Cloud 0 has 19 points, .*, which takes 20"
    ):
      segment_points(self.parts, [few], "box")

  def test_clouds_of_less_than_their_levels_are_not_trained_on(self):
    fields = config(dict(name="part_segmentation", levels=(41, 11)), parts=True)
    with self.assertRaisesRegex(
      ValueError, "data.num_points=40 is too few .*objective.levels.* need 41"
    ):
      experiment.build(settings(fields), devices=jax.devices()[:1])

  def test_meshes_are_sampled_as_densely_as_clouds_of_training(self):
    self.assertEqual(points_to_sample(self.classes), 90)
    published = mock.Mock(
      config=None, objective_spec={"name": "point_classification"}
    )
    self.assertEqual(points_to_sample(published), 10_000)
    reading = reading_of(published)
    self.assertEqual((reading.num_points, reading.draw_eval), (1024, "first"))

  def test_classes_from_the_command_line(self):
    import trimesh

    np.save(self.root / "cloud.npy", self.clouds[0])
    trimesh.creation.box((2, 1, 0.5)).export(self.root / "box.obj")
    done = subprocess.run(
      [
        *(sys.executable, "-m", "bertjax.predict", "classify_points"),
        f"--model={self.root / 'classes'}",
        f"--input={self.root / 'cloud.npy'}",
        f"--input={self.root / 'box.obj'}",
        "--votes=2",
      ],
      cwd=pathlib.Path(__file__).parents[1],
      env=os.environ | {"JAX_PLATFORMS": "cpu"},
      capture_output=True,
      text=True,
      check=False,
    )
    self.assertEqual(done.returncode, 0, done.stderr)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    mesh = read_cloud(self.root / "box.obj", 90)
    wanted = classify_points(self.classes, [self.clouds[0], mesh], votes=2)
    for line, said, name in zip(lines, wanted, ("cloud.npy", "box.obj")):
      self.assertEqual(line["input"], str(self.root / name))
      self.assertEqual(line["label"], said["label"])
      self.assertAlmostEqual(line["probability"], said["probability"], places=4)

  def test_parts_are_written_beside_their_points(self):
    np.savetxt(self.root / "cloud.xyz", self.clouds[1])
    given = types.SimpleNamespace(
      input=[str(self.root / "cloud.xyz")],
      output=str(self.root / "parts.npy"),
      category="cone",
      batch_size=2,
    )
    _, _, command = TASKS["segment_points"]
    command(self.parts, [], given)
    rows = np.load(given.output)
    np.testing.assert_allclose(rows[:, :3], self.clouds[1], atol=1e-6)
    (wanted,) = segment_points(self.parts, [self.clouds[1]], "cone")
    np.testing.assert_array_equal(rows[:, 3], wanted)
    given.output = str(self.root / "parts.PLY")
    command(self.parts, [], given)
    written = pathlib.Path(given.output).read_text()
    self.assertEndsWith(written, f" {wanted[-1]}\n")
    given.output = str(self.root / "parts.npy")
    given.input *= 2
    with self.assertRaisesRegex(ValueError, "parts.npy holds one cloud"):
      command(self.parts, [], given)
    given.output = str(self.root / "parts.jsonl")
    command(self.parts, [], given)
    lines = (self.root / "parts.jsonl").read_text().splitlines()
    for line in lines:
      self.assertEqual(json.loads(line)["parts"], wanted.tolist())
    self.assertLen(lines, 2)
    given.category = None
    with self.assertRaisesRegex(ValueError, "--category is missing"):
      command(self.parts, [], given)


class CloudFilesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir())
    self.cloud = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)

  def test_tables_and_arrays(self):
    rows = np.concatenate([self.cloud, np.ones((9, 2))], 1)
    np.save(self.root / "a.npy", rows)
    np.savetxt(self.root / "b.txt", rows)
    np.savetxt(self.root / "c.csv", rows, delimiter=",")
    for name in ("a.npy", "b.txt", "c.csv"):
      found = read_cloud(self.root / name, 5)
      np.testing.assert_allclose(found, self.cloud, rtol=1e-6)

  def test_clouds_that_are_written_can_be_read(self):
    import trimesh

    parts, far = np.arange(9) % 4, self.cloud + np.array(FAR)
    for written in (None, parts):
      for name in ("a.ply", "a.npy", "b.PLY", "b.NPY"):
        for cloud in (self.cloud, far):
          write_cloud(self.root / name, cloud, written)
          found = read_cloud(self.root / name, 5)
          np.testing.assert_array_equal(found, cloud)
    self.assertLen([*self.root.iterdir()], 4)
    raw = trimesh.load(self.root / "a.ply").metadata["_ply_raw"]["vertex"]
    np.testing.assert_array_equal(raw["data"]["part"].reshape(-1), parts)
    with self.assertRaisesRegex(ValueError, "a.gif must end in .npy or .ply"):
      write_cloud(self.root / "a.gif", self.cloud)

  @parameterized.parameters(
    ("a.txt", "x y z", "a.txt holds no points"),
    ("a.txt", "1 2", r"array of shape \(1, 2\)"),
    ("a.txt", "1 2 3\n1 2 3 4\n", "a.txt holds no points"),
    ("a.txt", "1 2 3\n1 2 3\n", "a.txt: its 2 points all lie in one place"),
    ("a.xyz", "1 2 nan", "a.xyz holds coordinates that are not finite"),
    ("a.npy", "", "a.npy holds no points"),
    ("a.gif", "1 2 3", "the ending must be one of .npy"),
    ("a.ply", "no mesh", "a.ply cannot be read: ValueError"),
    ("a.off", "no mesh", "a.off cannot be read"),
    ("a.obj", "no mesh", "a.obj holds no surface"),
    ("a.obj", "v 0 0 0\nv 1 0 0\nv 1 0 0\nf 1 2 3\n", "a.obj holds no surface"),
  )
  def test_what_is_no_cloud(self, name, text, message):
    (self.root / name).write_text(text)
    with self.assertRaisesRegex(ValueError, message):
      read_cloud(self.root / name, 5)
    with self.assertRaisesRegex(ValueError, "nowhere.npy is not a file"):
      read_cloud(self.root / "nowhere.npy", 5)


if __name__ == "__main__":
  absltest.main()
