"""Procedural shapes: pure functions of an index, of telling form."""

import numpy as np
from absl.testing import absltest
from sklearn.ensemble import RandomForestClassifier

from bertjax.data.shapes.procedural import SHAPES, ProceduralShapes


class ProceduralTest(absltest.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    cls.source = ProceduralShapes(num_points=200)
    cls.shapes = [cls.source[i] for i in range(20 * len(SHAPES))]

  def test_a_shape_is_a_function_of_seed_and_index(self):
    again = ProceduralShapes(num_points=200)[17]
    np.testing.assert_array_equal(again.points, self.shapes[17].points)
    other = ProceduralShapes(num_points=200, seed=1)[17]
    self.assertEqual(other.label, again.label)
    self.assertGreater(np.abs(other.points - again.points).max(), 0.1)

  def test_clouds_fill_the_unit_sphere(self):
    for shape in self.shapes:
      np.testing.assert_allclose(shape.points.mean(0), 0, atol=1e-5)
      norms = np.linalg.norm(shape.points, axis=1)
      self.assertAlmostEqual(norms.max(), 1, delta=1e-5)

  def test_classes_are_equally_frequent_and_parts_are_theirs(self):
    counts = np.bincount([shape.label for shape in self.shapes])
    np.testing.assert_array_equal(counts, 20)
    for name in SHAPES:
      label = self.source.classes.index(name)
      mine = [s.parts for s in self.shapes if s.label == label]
      seen = {self.source.parts[i] for i in np.unique(np.concatenate(mine))}
      every = {p for p in self.source.parts if p.startswith(f"{name}/")}
      self.assertEqual(seen, every)

  def test_parts_lie_where_their_names_say(self):
    for shape in self.shapes:
      names = np.array(self.source.parts)[shape.parts]
      heights = {n: shape.points[names == n, 2].mean() for n in set(names)}
      for high, low in (
        ("table/board", "table/leg"),
        ("chair/back", "chair/leg"),
        ("lamp/shade", "lamp/base"),
        ("bottle/neck", "bottle/body"),
        ("cylinder/top", "cylinder/bottom"),
      ):
        if high in heights:
          self.assertGreater(heights[high], heights[low])

  def test_classes_can_be_told_apart_but_not_by_a_glance(self):
    def features(shape):
      gaps = shape.points[:100, None] - shape.points[None, 100:]
      distances = np.sqrt((gaps**2).sum(-1))
      return np.histogram(distances, 24, (0, 2), density=True)[0]

    x = np.stack([features(shape) for shape in self.shapes])
    y = np.array([shape.label for shape in self.shapes])
    half = len(x) // 2
    forest = RandomForestClassifier(100, random_state=0).fit(x[:half], y[:half])
    accuracy = forest.score(x[half:], y[half:])
    self.assertBetween(accuracy, 0.6, 0.99)

  def test_bad_arguments_are_named(self):
    with self.assertRaisesRegex(ValueError, "classes='tabel'.*'table'"):
      ProceduralShapes(classes=("tabel",))
    with self.assertRaisesRegex(ValueError, "classes is empty"):
      ProceduralShapes(classes=())
    with self.assertRaisesRegex(ValueError, "num_points=0 .* at least 1"):
      ProceduralShapes(num_points=0)
    with self.assertRaisesRegex(ValueError, "jitter=-0.1 must not be negat"):
      ProceduralShapes(jitter=-0.1)


if __name__ == "__main__":
  absltest.main()
