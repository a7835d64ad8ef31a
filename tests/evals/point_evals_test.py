"""Linear probes, votes of views, and IoU of parts."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.data.shapes.dataset import PointDataset, Reading
from bertjax.data.shapes.files import Cloud, Clouds
from bertjax.data.shapes.stored import Stored
from bertjax.evals import linear_probe, part_iou, voting
from bertjax.evals.linear_probe import FEATURES
from bertjax.evals.part_iou import shape_ious
from bertjax.parallel.mesh import make_mesh

B, N = 8, 12


class Split:
  def __init__(self, rows):
    self.rows = rows

  def evaluation_batches(self, batch_size, num_batches, index, count):
    del index, count
    total = len(next(iter(self.rows.values())))
    for first in range(0, total, batch_size)[:num_batches]:
      yield {k: v[first : first + batch_size] for k, v in self.rows.items()}


class Rows:
  """Data by split, all of the same shapes."""

  batch_size, train_split = B, "train"

  def __init__(self, **splits):
    self.splits = splits

  def dataset(self, split):
    return Split(self.splits[split])

  def batch_spec(self, batch_size):
    rows = next(iter(self.splits.values()))
    return {
      k: jax.ShapeDtypeStruct((batch_size, *v.shape[1:]), v.dtype)
      for k, v in rows.items()
    }

  def baseline(self, split, num_batches=None):
    return {}


class Listed(Clouds):
  """Clouds in memory."""

  def __init__(self, rows):
    super().__init__([], rows["labels"].tolist())
    self._points = rows["points"]

  def __len__(self):
    return len(self._points)

  def __getitem__(self, index):
    return Cloud(self._points[index], self._labels[index])

  def fingerprint(self):
    return "listed"


class PointRows:
  """Data of points with one split."""

  batch_size = B

  def __init__(self, rows, num_points=N - 3):
    self.reading = Reading(num_points=num_points, unit_sphere=False)
    self._dataset = PointDataset(Listed(rows), self.reading)

  def dataset(self, split):
    del split
    return self._dataset

  def baseline(self, split):
    return {}


class Means:
  """An objective that knows a cloud by the mean of its points."""

  num_categories, num_parts = 2, 5
  class_parts = ((0, 1, 2), (3, 4))

  def apply(self, variables, batch, method):
    means = batch["points"].mean(1)
    if method == "encode":
      return jnp.stack([means, batch["points"][:, 0]], axis=1)
    if method == "logits" and "parts" in batch:
      return batch["points"] @ variables["parts"]
    return jnp.concatenate([means, -means], axis=1)


def clouds(count, seed, noise=0.1):
  """Class i lies on axis i % 3, at +1 or -1; the last two have no label."""
  rng = np.random.default_rng(seed)
  labels = np.arange(count, dtype=np.int32) % 6
  centres = np.eye(3)[labels % 3] * np.where(labels < 3, 1, -1)[:, None]
  points = centres[:, None] + noise * rng.normal(size=(count, N, 3))
  labels[-2:] = -1
  return {"points": points.astype(np.float32), "labels": labels}


class EvaluatorsTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.shared = dict(objective=Means(), mesh=make_mesh())

  def test_a_probe_separates_what_is_linear(self):
    train, test = clouds(40, 0), clouds(24, 1)
    mixed = dict(train, labels=np.random.default_rng(2).permutation(40) % 6)
    for rows, low, high in ((train, 1.0, 1.0), (mixed, 0.0, 0.6)):
      data = Rows(train=rows, validation=test)
      evaluator = linear_probe(data=data, **self.shared)
      found = evaluator({}, jax.random.key(0))
      self.assertBetween(found["accuracy"], low, high)
      self.assertEqual(found["rows"], 22)

  def test_a_probe_sees_no_more_than_its_features(self):
    class Told:
      """[CLS] knows a third of a class, its contrast a half, patches all."""

      contrasts = True

      def apply(self, variables, batch, method):
        labels = batch["labels"]
        if method == "project":
          return jax.nn.one_hot(labels // 3, 2)
        third, whole = (jax.nn.one_hot(x, 6) for x in (labels % 3, labels))
        return jnp.stack([third, whole, whole], axis=1)

    data = Rows(train=clouds(40, 0), validation=clouds(32, 1))
    for name, accuracy in (("cls", 1 / 2), ("contrast", 1 / 3), ("cls_max", 1)):
      found = linear_probe(
        data=data, features=name, objective=Told(), mesh=make_mesh()
      )({}, jax.random.key(0))
      self.assertAlmostEqual(found["accuracy"], accuracy)
    hidden = np.random.default_rng(0).normal(size=(2, 4, 3)).astype("f4")
    hidden[:, 0] += 9  # larger than any patch
    pooled = {name: f.pool(hidden) for name, f in FEATURES.items()}
    np.testing.assert_array_equal(pooled["cls"], hidden[:, 0])
    np.testing.assert_array_equal(
      pooled["cls_max"], np.hstack([hidden[:, 0], hidden[:, 1:].max(1)])
    )
    with self.assertRaisesRegex(ValueError, "'contrast' needs an objective th"):
      linear_probe(data=data, features="contrast", **self.shared)

  def test_a_probe_refuses_what_has_no_classes(self):
    points = clouds(8, 0)
    lonely = dict(points, labels=np.zeros(8, np.int32))
    evaluator = linear_probe(
      data=Rows(train=lonely, validation=points), **self.shared
    )
    with self.assertRaisesRegex(
      ValueError, "labels of 1 classes; it takes two"
    ):
      evaluator({}, jax.random.key(0))
    points.pop("labels")
    with self.assertRaisesRegex(ValueError, "labels int32 .b.; .* have none"):
      linear_probe(data=Rows(train=points), **self.shared)
    with self.assertRaisesRegex(ValueError, "features='first' is unknown"):
      linear_probe(data=Rows(train=lonely), features="first", **self.shared)

  @parameterized.parameters(
    (slice(0), "has no row to evaluate on"),
    (slice(-2, None), "has no labelled row to evaluate on"),
  )
  def test_a_split_with_nothing_to_read_has_no_value(self, part, message):
    rows = {name: x[part] for name, x in clouds(8, 0).items()}
    rows["category"] = np.zeros_like(rows["labels"])
    rows["parts"] = np.full(rows["points"].shape[:2], -1, np.int32)
    shared = dict(data=Rows(train=clouds(8, 0), validation=rows), **self.shared)
    shared |= dict(mesh=make_mesh(devices=jax.devices()[:1]))
    for evaluator in (linear_probe, part_iou):
      with self.assertRaisesRegex(ValueError, f"split='validation' {message}"):
        evaluator(**shared)({"parts": jnp.ones((3, 5))}, jax.random.key(0))

  def test_a_probe_of_no_batch_is_refused(self):
    data = Rows(train=clouds(8, 0))
    with self.assertRaisesRegex(ValueError, "num_batches=0 must be at least 1"):
      linear_probe(data=data, num_batches=0, **self.shared)

  def test_votes_are_of_all_views_and_none_of_fillings(self):
    data = PointRows(clouds(40, 0, noise=0.5))
    evaluator = voting(data=data, views=4, **self.shared)
    found = evaluator({}, jax.random.key(0))
    self.assertEqual(found, evaluator({}, jax.random.key(1)))
    dataset = data.dataset("validation")
    logits = []
    for number in range(4):
      stream = PointDataset(dataset.clouds, dataset.reading, 20_181_011, number)
      rows = stream.rows(0, 40)
      logits.append(Means().apply({}, rows, "logits"))
    self.assertGreater(np.ptp(logits, axis=0).min(), 0)  # no two are alike
    known = rows["labels"] >= 0
    self.assertEqual(known.sum(), 38)
    for name, scores in (
      ("accuracy", np.sum(logits, axis=0)),
      ("single_view_accuracy", logits[0]),
    ):
      right = (scores.argmax(1) == rows["labels"])[known].mean()
      self.assertAlmostEqual(found[name], right)

  def test_many_views_see_more_than_one(self):
    far = (dict(name="scale_shift", low=0.9, high=1.1, shift=2.0),)
    data = PointRows(clouds(40, 0, noise=0.5))
    found = voting(data=data, views=50, augment=far, **self.shared)(
      {}, jax.random.key(0)
    )
    self.assertLess(found["single_view_accuracy"], 0.7)
    self.assertGreater(found["accuracy"], found["single_view_accuracy"] + 0.2)

  def test_views_are_drawn_of_the_points_that_are_kept(self):
    """Of a cluster and a few points far away, farthest points keep the few."""
    few = np.arange(4)[:, None] + np.zeros((4, 3))
    many = np.random.default_rng(0).normal(scale=0.01, size=(96, 3))
    cloud = np.concatenate([many, few]).astype(np.float32)
    data = PointRows({"points": cloud[None], "labels": np.zeros(1, np.int32)},
                     num_points=9)  # fmt: skip
    folder = pathlib.Path(self.create_tempdir())
    kept = Stored(data.dataset("").clouds, 12, folder, farthest=True)
    dataset = PointDataset(kept, data.reading)
    ((*views,),) = dataset.views(20, data.reading, 1)
    far = [(np.abs(view["points"]).max(-1) > 0.5).sum() for view in views]
    # Of 3 among 12 points 9 are drawn; of all 100 hardly one would be.
    self.assertBetween(np.mean(far), 2, 2.5)
    self.assertLen({view["points"].tobytes() for view in views}, 20)

  def test_views_that_there_are_not(self):
    data = PointRows(clouds(8, 0))
    for options, message in (
      (dict(views=0), "views=0 must be at least 1"),
      (dict(draw="first"), "makes all views alike"),
      (dict(draw="frist"), "'frist' is unknown"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        voting(data=data, **options, **self.shared)
    with self.assertRaisesRegex(ValueError, "data.name='points', not Rows"):
      voting(data=Rows(validation=clouds(8, 0)), **self.shared)

  def test_ious_are_those_of_a_loop(self):
    rng = np.random.default_rng(0)
    category = np.array([0, 0, 1, 1, 0, 1, 0, 0], np.int32)
    own = np.zeros((B, 5), bool)
    parts = np.zeros((B, N), np.int32)
    for i, c in enumerate(category):
      own[i, list(Means.class_parts[c])] = True
      parts[i] = rng.choice(Means.class_parts[c][:-1], N)  # one is absent
    parts[0, :3] = -1
    logits = rng.normal(size=(B, N, 5)).astype(np.float32)
    expected = []
    for i, c in enumerate(category):
      mine = Means.class_parts[c]
      guess = np.array([mine[j] for j in logits[i][:, list(mine)].argmax(1)])
      known, each = parts[i] >= 0, []
      for part in mine:
        a, b = (guess == part) & known, (parts[i] == part) & known
        each.append((a & b).sum() / (a | b).sum() if (a | b).any() else 1.0)
      expected.append(np.mean(each))
    np.testing.assert_allclose(
      shape_ious(logits, parts, own), expected, rtol=1e-6
    )

  def test_means_over_objects_and_over_categories(self):
    rng = np.random.default_rng(0)
    points = rng.normal(size=(B, N, 3)).astype(np.float32)
    weights = jnp.asarray(rng.normal(size=(3, 5)).astype(np.float32))
    category = np.array([0, 0, 1, 0, 0, 1, 0, 0], np.int32)
    allowed = np.array([[1, 1, 1, 0, 0], [0, 0, 0, 1, 1]], bool)[category]
    logits = np.where(allowed[:, None], points @ weights, -np.inf)
    parts = logits.argmax(-1).astype(np.int32)
    parts[3] = (parts[3] + 1) % 3  # all wrong
    parts[7] = -1  # fills the batch
    rows = {"points": points, "category": category, "parts": parts}
    found = part_iou(data=Rows(validation=rows), **self.shared)(
      {"parts": weights}, jax.random.key(0)
    )
    wrong = float(
      shape_ious(points[3:4] @ weights, parts[3:4], allowed[3:4])[0]
    )
    self.assertLess(wrong, 0.4)
    self.assertAlmostEqual(found["instance_miou"], (6 + wrong) / 7, places=5)
    self.assertAlmostEqual(
      found["class_miou"], ((4 + wrong) / 5 + 1) / 2, places=5
    )

  def test_parts_need_their_objective(self):
    with self.assertRaisesRegex(ValueError, "objective.name='part_segment"):
      part_iou(objective=object(), data=Rows(), mesh=make_mesh())


if __name__ == "__main__":
  absltest.main()
