"""Linear probes, votes of views, and IoU of parts."""

import jax
import jax.numpy as jnp
import numpy as np
from absl.testing import absltest, parameterized

from bertjax.evals import linear_probe, part_iou, voting
from bertjax.evals.part_iou import shape_ious
from bertjax.evals.voting import view
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

  def test_views_are_parts_of_the_cloud_scaled_and_moved(self):
    cloud = clouds(40, 0)["points"]
    some = np.asarray(view(jax.random.key(0), cloud, 7, (1.0, 1.0), 0.0))
    for part, whole in zip(some, cloud):
      chosen = {tuple(p) for p in part}
      self.assertLen(chosen, 7)
      self.assertLessEqual(chosen, {tuple(p) for p in whole})
    # Deviations of a cloud's points tell its scale, their mean its shift.
    seen = np.asarray(view(jax.random.key(0), cloud, N, (0.5, 1.5), 0.2))
    scales = seen.std(1) / cloud.std(1)
    shifts = seen.mean(1) - scales * cloud.mean(1)
    self.assertBetween(scales.min(), 0.5, 0.6)
    self.assertBetween(scales.max(), 1.4, 1.5)
    self.assertBetween(np.abs(shifts).max(), 0.17, 0.2001)
    self.assertGreater(np.abs(scales[:, 0] - scales[:, 1]).min(), 0)

  def test_votes(self):
    data = Rows(validation=clouds(40, 0, noise=0.5))
    plain = voting(data=data, views=1, scale=(1, 1), shift=0.0, **self.shared)(
      {}, jax.random.key(0)
    )
    rows = data.splits["validation"]
    logits = Means().apply({}, rows, "logits")
    right = (logits.argmax(1) == rows["labels"])[:-2].mean()
    self.assertEqual(plain, {"accuracy": right, "single_view_accuracy": right})
    # Views that lie far off err, but not all in the same way.
    far = voting(
      data=data, views=50, scale=(0.9, 1.1), shift=2.0, **self.shared
    )({}, jax.random.key(0))
    self.assertLess(far["single_view_accuracy"], 0.7)
    self.assertGreater(far["accuracy"], far["single_view_accuracy"] + 0.2)

  @parameterized.parameters(
    (dict(views=0), "views=0 must be at least 1"),
    (dict(num_points=13), "num_points=13 between 1 and 12"),
  )
  def test_views_that_there_are_not(self, options, message):
    data = Rows(validation=clouds(8, 0))
    with self.assertRaisesRegex(ValueError, message):
      voting(data=data, **options, **self.shared)

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
