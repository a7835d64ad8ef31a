"""Rows of points: what is drawn, what is done to it, what a split holds."""

import os
import pathlib
import pickle
import shutil
import zipfile
from unittest import mock

import numpy as np
from absl.testing import absltest, parameterized
from scipy.spatial import cKDTree

from bertjax import points, registry
from bertjax.data.points import PointData, abstract_points, with_classes
from bertjax.data.shapes import drawing
from bertjax.data.shapes.sources import About

_SIZES = dict(train=36, validation=24, test=12)
_SOURCE = dict(name="procedural", sizes=_SIZES, points=40)


def data(cache_dir="unused", **changes):
  spec = dict(source=_SOURCE, num_points=25, batch_size=6) | changes
  return registry.call(
    PointData, spec, "data", seed=3, cache_dir=pathlib.Path(cache_dir)
  )


def assert_same(a, b):
  for name in a:
    np.testing.assert_array_equal(a[name], b[name])


class StreamTest(parameterized.TestCase):
  def test_a_row_depends_on_seed_epoch_and_cloud_alone(self):
    dataset = data(augment=[dict(name="scale_shift")]).dataset()
    whole = dataset.rows(30, 80)  # across two borders of epochs
    part = data(augment=[dict(name="scale_shift")]).dataset().rows(41, 47)
    assert_same(part, {k: v[11:17] for k, v in whole.items()})
    again = data().dataset().reseeded(4).rows(30, 31)
    self.assertFalse((again["points"] == whole["points"][:1]).all())

  def test_an_epoch_has_every_cloud_once_with_other_points(self):
    dataset = data().dataset()
    first, second = dataset.rows(0, 36), dataset.rows(36, 72)
    for epoch in (first, second):
      np.testing.assert_array_equal(np.sort(epoch["index"]), np.arange(36))
      np.testing.assert_array_equal(epoch["labels"], epoch["index"] % 12)
    self.assertFalse((first["index"] == second["index"]).all())
    a = first["points"][first["index"] == 7]
    b = second["points"][second["index"] == 7]
    self.assertFalse((a == b).all())

  def test_hosts_read_their_slices(self):
    dataset = data().dataset()
    parts = [dataset.batch(2, 6, index, 3) for index in range(3)]
    whole = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    assert_same(whole, dataset.batch(2, 6))

  def test_reading_goes_on_where_it_was(self):
    batches = data().dataset().iterator(6, prefetch=2)
    for _ in range(4):
      next(batches)
    state = batches.get_state()
    other = data().dataset().iterator(6, prefetch=0)
    other.set_state(state)
    assert_same(next(batches), next(other))
    with self.assertRaisesRegex(ValueError, "belongs to other data"):
      data(num_points=24).dataset().iterator(6, prefetch=0).set_state(state)
    batches.close()

  def test_evaluation_is_the_same_for_all_seeds_and_not_augmented(self):
    options = dict(augment=[dict(name="scale_shift")])
    one, two = (
      list(data(**o).dataset("validation").evaluation_batches(9))
      for o in ({}, options)
    )
    self.assertLen(one, 3)
    for a, b in zip(one, two, strict=True):
      assert_same(a, b)
    index = np.concatenate([batch["index"] for batch in one])
    np.testing.assert_array_equal(np.sort(index)[3:], np.arange(24))
    last = {k: v[-3:] for k, v in one[-1].items()}  # 27 places, 24 clouds
    np.testing.assert_array_equal(last["labels"], -1)
    np.testing.assert_array_equal(last["index"], -1)
    np.testing.assert_array_equal(last["points"], 0)

  def test_rows_are_as_announced_without_reading(self):
    for changes in ({}, dict(parts=True)):
      real = data(**changes)
      spec = dict(name="points", source=_SOURCE, num_points=25, batch_size=6)
      abstract = abstract_points(spec | changes)
      self.assertEqual(abstract.batch_spec(6), real.batch_spec(6))
      self.assertEqual(
        abstract.tokens_per_batch(6), real.dataset().tokens_per_batch(6)
      )
      batch = real.dataset().batch(0, 6)
      found = {k: (v.shape, v.dtype) for k, v in batch.items()}
      wanted = {k: (v.shape, v.dtype) for k, v in real.batch_spec(6).items()}
      self.assertEqual(found, wanted)
    with self.assertRaisesRegex(ValueError, "vocab_size=9 is for data of text"):
      abstract_points(spec, 9)


class RowsTest(parameterized.TestCase):
  def test_clouds_are_moved_into_the_unit_sphere(self):
    rows = data().dataset().rows(0, 20)["points"]
    np.testing.assert_allclose(rows.mean(1), 0, atol=1e-6)
    np.testing.assert_allclose(
      np.linalg.norm(rows, axis=2).max(1), 1, rtol=1e-6
    )
    as_they_are = data(unit_sphere=False, num_points=40).dataset()
    batch = as_they_are.rows(0, 1)
    stored = as_they_are.clouds[int(batch["index"][0])].points
    np.testing.assert_array_equal(
      np.sort(batch["points"][0], axis=0), np.sort(stored, axis=0)
    )

  def test_parts_go_with_their_points(self):
    dataset = data(parts=True, unit_sphere=False).dataset()
    batch = dataset.rows(0, 12)
    np.testing.assert_array_equal(batch["category"], batch["labels"])
    for row in range(12):
      cloud = dataset.clouds[int(batch["index"][row])]
      _, nearest = cKDTree(cloud.points).query(batch["points"][row])
      np.testing.assert_array_equal(batch["parts"][row], cloud.parts[nearest])
      parts = dataset.clouds.class_parts[batch["labels"][row]]
      self.assertContainsSubset(set(batch["parts"][row]), parts)
    every = [p for parts in dataset.clouds.class_parts for p in parts]
    self.assertEqual(every, list(range(len(every))))

  @parameterized.product(
    name=("subset", "first"), count=(2, 25, 40, 41, 80, 90)
  )
  def test_draws_are_of_all_points_alike(self, name, count):
    rng = np.random.default_rng(0)
    found = drawing.DRAWS[name](40, count, rng)
    times = np.bincount(found, minlength=40)
    self.assertLen(times, 40)
    self.assertEqual(times.sum(), count)
    self.assertContainsSubset(times.tolist(), (count // 40, -(-count // 40)))
    again = drawing.DRAWS[name](40, count, rng)
    self.assertEqual((found == again).all(), name == "first")

  def test_draws_with_replacement_repeat_points(self):
    found = drawing.DRAWS["replacement"](40, 40, np.random.default_rng(0))
    self.assertLess(len(set(found.tolist())), 35)  # 1 - 1/e of 40 are 25

  def test_every_axis_is_scaled_and_shifted_on_its_own(self):
    rng = np.random.default_rng(0)
    cloud, apply = rng.normal(size=(30, 3)), drawing.scale_shift()
    maps = []
    for _ in range(300):
      moved = apply(cloud, rng)
      # Columns of the affine map that takes one cloud to the other.
      ones = np.concatenate([cloud, np.ones((30, 1))], 1)
      maps.append(np.linalg.lstsq(ones, moved, rcond=None)[0])
      np.testing.assert_allclose(ones @ maps[-1], moved, atol=1e-9)
    maps = np.array(maps)
    scales = maps[:, [0, 1, 2], [0, 1, 2]]
    np.testing.assert_allclose(maps[:, 0, 1], 0, atol=1e-9)
    self.assertBetween(scales.min(), 2 / 3, 0.7)
    self.assertBetween(scales.max(), 1.47, 1.5)
    self.assertBetween(np.abs(maps[:, 3]).max(), 0.19, 0.2)
    self.assertLess(np.abs(np.corrcoef(scales.T) - np.eye(3)).max(), 0.3)

  def test_turns_keep_distances_and_height(self):
    rng = np.random.default_rng(0)
    cloud = rng.normal(size=(30, 3))
    moved = drawing.rotate("y")(cloud, rng)
    np.testing.assert_array_equal(moved[:, 1], cloud[:, 1])
    np.testing.assert_allclose(moved @ moved.T, cloud @ cloud.T, atol=1e-9)
    self.assertGreater(np.abs(moved - cloud).max(), 0.1)

  def test_noise_is_cut_off(self):
    zeros, rng = np.zeros((4000, 3)), np.random.default_rng(0)
    noise = drawing.jitter(0.03, 0.05)(zeros, rng)
    self.assertEqual(np.abs(noise).max(), 0.05)
    self.assertAlmostEqual(np.std(noise), 0.027, delta=0.002)

  @parameterized.parameters(
    (dict(num_points=0), "data.num_points=0 must be positive"),
    (dict(draw="fps"), "data.draw='fps' is unknown"),
    (dict(stored_points=0), "data.stored_points=0 must be positive"),
    (dict(source=dict(name="meshes", path=".", points=0)), "points=0 must be"),
    (dict(augment=["jitter"]), "data.augment='jitter' must be a dict"),
    (dict(augment=[dict(name="flip")]), "data.augment.name='flip'"),
    (dict(augment=[dict(name="rotate", axis="up")]), "augment.axis='up'"),
    (dict(augment=[dict(name="scale_shift", low=2)]), "low=2, high=1.5"),
    (dict(farthest=True), "data.stored_points, which is missing"),
    (dict(label_fraction=0), r"data.label_fraction=0 must lie in \(0, 1\]"),
    (dict(few_shot=dict(ways=5)), "data.few_shot.shots is required"),
    (dict(source=dict(name="procedural", sizes=dict(train=0))), "train=0"),
    (dict(source=dict(name="shapenet55", path="nowhere")), "'nowhere' is not"),
    (dict(source=dict(name="meshes", path="nowhere")), "'nowhere' is not"),
    (dict(train_split="training"), "data.source.sizes='training' is unknown"),
  )
  def test_what_does_not_fit_is_refused_by_name(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      data(**changes).dataset()


class SubsetsTest(parameterized.TestCase):
  def test_a_share_of_every_class(self):
    few = data(label_fraction=2 / 3, batch_size=2)
    self.assertEqual(few.facts()["rows"], 24)
    counts = np.bincount(few.dataset().clouds.labels)
    np.testing.assert_array_equal(counts, 2)
    self.assertLen(few.dataset("validation").clouds, 24)
    chosen = [
      data(label_fraction=1 / 3, subset_seed=seed).dataset().fingerprint()
      for seed in (0, 0, 1)
    ]
    self.assertEqual(chosen[0], chosen[1])
    self.assertNotEqual(chosen[0], chosen[2])

  def test_few_shots_of_few_classes(self):
    names = set()
    for fold in range(3):
      few = data(few_shot=dict(ways=5, shots=2, tests=1, fold=fold))
      train, test = few.dataset().clouds, few.dataset("test").clouds
      self.assertEqual(train.classes, test.classes)
      np.testing.assert_array_equal(np.bincount(train.labels), [2] * 5)
      np.testing.assert_array_equal(np.bincount(test.labels), [1] * 5)
      self.assertEqual([cloud.label for cloud in train], [*train.labels])
      names.add(train.classes)
      self.assertEqual(few.objective({"name": "classification"})["labels"],
                       train.classes)  # fmt: skip
    self.assertLen(names, 3)

  def test_labels_of_few_shots_are_those_of_their_classes(self):
    few = data(few_shot=dict(ways=4, shots=3, tests=1))
    every, chosen = data().dataset().clouds, few.dataset().clouds
    for cloud in chosen:
      same = [np.array_equal(cloud.points, other.points) for other in every]
      whole = every[same.index(True)]
      self.assertEqual(every.classes[whole.label], chosen.classes[cloud.label])

  @parameterized.parameters(
    (dict(ways=13, shots=1), "ways=13: there are only 12 classes"),
    (dict(ways=2, shots=4), "few_shot.shots=4: class '.*' has only 3 clouds"),
    (dict(ways=0, shots=4), "few_shot.ways=0 must be at least 1"),
  )
  def test_more_than_there_is(self, few_shot, message):
    with self.assertRaisesRegex(ValueError, message):
      data(few_shot=few_shot).dataset()

  @parameterized.parameters("2way3shot", "2way_3shot")
  def test_published_few_shot_tasks(self, folder):
    root = pathlib.Path(self.create_tempdir())
    rng = np.random.default_rng(0)
    rows = {
      split: [
        (rng.normal(size=(7, 6)), i % 2, 30 + i % 2) for i in range(count)
      ]
      for split, count in (("train", 6), ("test", 4))
    }
    (root / folder).mkdir()
    path = root / folder / "4.pkl"
    path.write_bytes(pickle.dumps(rows))
    source = dict(name="modelnet40_few_shot", path=str(root), ways=2, shots=3)
    read = data(source=source | dict(fold=4), unit_sphere=False, num_points=7)
    self.assertEqual(read.dataset().clouds.classes, ("30", "31"))
    self.assertLen(read.dataset("test").clouds, 4)
    cloud = read.dataset().clouds[3]
    np.testing.assert_allclose(cloud.points, rows["train"][3][0][:, :3],
                               rtol=1e-6)  # fmt: skip
    self.assertEqual(cloud.label, 1)
    with self.assertRaisesRegex(ValueError, "no 0.pkl in 2way3shot or 2way_3"):
      data(source=source).dataset()

  def test_objectives_get_the_classes_that_they_ask_for(self):
    found = data().objective({"name": "classification"})
    self.assertEqual(found["num_classes"], 12)
    self.assertEqual(found["labels"][:2], ("sphere", "box"))
    plain = dict(name="point_reconstruction", kl_weight=1.0)
    self.assertEqual(data().objective(plain), plain)
    with self.assertRaisesRegex(ValueError, "num_classes=40 does not fit"):
      with_classes(dict(name="classification", num_classes=40), About(15))


class StoredTest(parameterized.TestCase):
  @parameterized.parameters(0o022, 0o077)
  def test_points_are_for_whom_the_umask_lets_read_them(self, umask):
    folder = pathlib.Path(self.create_tempdir())
    self.addCleanup(os.umask, os.umask(umask))
    data(folder, stored_points=9, num_points=8).clouds()
    modes = {p.stat().st_mode & 0o777 for p in folder.glob("points/*")}
    self.assertEqual(modes, {0o666 & ~umask})

  def test_farthest_points_come_first(self):
    folder = pathlib.Path(self.create_tempdir())
    options = dict(stored_points=30, farthest=True, draw_eval="first")
    dataset = data(folder, **options, num_points=8).dataset()
    (batch,) = dataset.evaluation_batches(36, 1)
    plain = data().dataset().clouds
    for points_, index in zip(batch["points"], batch["index"]):
      cloud = plain[int(index)].points
      chosen = points.farthest_point_sampling(cloud[None], 8)[0]
      wanted = cloud[np.asarray(chosen)]
      wanted = wanted - wanted.mean(0)
      wanted /= np.linalg.norm(wanted, axis=1).max()
      np.testing.assert_allclose(points_, wanted, atol=1e-5)
    self.assertLen(list(folder.glob("points/*.points.npy")), 1)
    self.assertLen(list(folder.glob("points/*")), 2)  # and the parts
    clouds = "bertjax.data.shapes.sources.ProceduralClouds.__getitem__"
    with mock.patch(clouds, side_effect=AssertionError):
      again = data(folder, **options, num_points=8).dataset()
      assert_same(again.rows(0, 5), dataset.rows(0, 5))

  def test_clouds_of_different_length(self):
    root, rng = pathlib.Path(self.create_tempdir()), np.random.default_rng(0)
    (root / "shapenet_pc").mkdir()
    clouds = [rng.normal(size=(n, 3)).astype(np.float32) for n in (9, 30, 12)]
    names = [f"{i}-model.npy" for i in range(3)]
    for name, cloud in zip(names, clouds):
      np.save(root / "shapenet_pc" / name, cloud)
    (root / "train.txt").write_text("\n".join(names))
    source = dict(name="shapenet55", path=str(root))
    stored = data(root, source=source, stored_points=9, farthest=True).clouds()
    for cloud, kept in zip(clouds, stored):
      chosen = points.farthest_point_sampling(cloud[None], 9)[0]
      np.testing.assert_array_equal(kept.points, cloud[np.asarray(chosen)])
    with self.assertRaisesRegex(
      ValueError, "Cloud 0 has 9 points, fewer .* 10"
    ):
      data(root / "new", source=source, stored_points=10).clouds()
    self.assertEmpty(list((root / "new").glob("points/*")))  # nor a part
    # The collection is the same elsewhere, and another one when it changes.
    moved = shutil.copytree(root, f"{root}-moved")
    elsewhere = source | dict(path=moved)
    first = data(root, source=source).clouds().fingerprint()
    self.assertEqual(data(source=elsewhere).clouds().fingerprint(), first)
    os.utime(pathlib.Path(moved) / "shapenet_pc" / names[1], (1, 1))
    self.assertNotEqual(data(source=elsewhere).clouds().fingerprint(), first)


class MeshesTest(absltest.TestCase):
  def write(self, root, name, extents=(2, 1, 0.5)):
    import trimesh

    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    trimesh.creation.box(extents=extents).export(path)

  def test_points_lie_on_the_surface_evenly(self):
    root = pathlib.Path(self.create_tempdir())
    for name in ("box/train/a.obj", "box/test/b.stl", "slab/train/c.off"):
      self.write(root, name)
    source = dict(name="meshes", path=str(root), points=4000)
    read = data(root / "cache", source=source)
    clouds = read.clouds()
    self.assertEqual(clouds.classes, ("box", "slab"))
    np.testing.assert_array_equal(clouds.labels, [0, 1])
    np.testing.assert_array_equal(read.clouds("test").labels, [0])
    half = np.array([1, 0.5, 0.25])
    sides = np.isclose(np.abs(clouds[0].points), half, atol=1e-5)
    self.assertTrue(sides.any(1).all())
    areas = np.array([0.5, 1, 2]) / 3.5  # of the pairs of sides
    np.testing.assert_allclose(sides.mean(0), areas, atol=0.04)
    with mock.patch("bertjax.data.shapes.meshes.sampled", side_effect=OSError):
      again = data(root / "cache", source=source).clouds()
      np.testing.assert_array_equal(again[1].points, clouds[1].points)

  def test_files_without_a_split_are_divided(self):
    root = pathlib.Path(self.create_tempdir())
    for number in range(30):
      self.write(root, f"box/{number}.ply")
    source = dict(name="meshes", path=str(root), points=10)
    counts = [
      len(data(root, source=source).source.open(split))
      for split in ("train", "validation", "test")
    ]
    self.assertEqual(sum(counts), 30)
    self.assertBetween(counts[0], 17, 29)

  def test_libraries_of_furniture(self):
    root = pathlib.Path(self.create_tempdir())
    self.write(root / "made", "a.obj")
    lines = ["id=SweetHome3D#Toy"]
    with zipfile.ZipFile(root / "toy.sh3f", "w") as archive:
      for number in range(12):
        member = f"toy/{number}.obj"
        archive.write(root / "made" / "a.obj", member)
        category = "Küche" if number % 3 else "Bad"
        lines += [f"model#{number}=/{member}", f"category#{number}={category}"]
      lines += ["model#12=/toy/lost.obj", "category#12=Bad"]
      text = "\n".join(lines).encode("latin-1")
      archive.writestr("PluginFurnitureCatalog.properties", text)
    source = dict(name="furniture", path=str(root), points=50)
    found = data(source=source).source
    clouds = found.open("train")
    self.assertEqual(clouds.classes, ("Bad", "Küche"))
    self.assertBetween(len(clouds), 5, 12)
    half = np.array([1, 0.5, 0.25])
    points_ = clouds[0].points
    self.assertTrue(np.isclose(np.abs(points_), half, atol=1e-5).any(1).all())
    for split in ("train", "test"):
      all_ = found.open(split)
      some = data(source=source | dict(categories=["Küche"])).source.open(split)
      self.assertEqual(some.classes, ("Küche",))
      self.assertLen(some, int((all_.labels == 1).sum()))
    with self.assertRaisesRegex(
      ValueError, "source.categories='Flur' is unknown; choose from Bad, Küche"
    ):
      data(source=source | dict(categories=["Flur"])).source.open("train")
    (root / "bad.sh3f").write_text("no archive")
    with self.assertRaisesRegex(ValueError, "bad.sh3f is no library"):
      data(source=source).dataset()

  def test_what_is_no_mesh(self):
    root = pathlib.Path(self.create_tempdir())
    source = dict(name="meshes", path=str(root), fractions=dict(train=1.0))
    with self.assertRaisesRegex(ValueError, "holds no mesh"):
      data(source=source).dataset()
    (root / "a.obj").write_text("v 0 0 0\nv 1 0 0\n")
    with self.assertRaisesRegex(ValueError, "a.obj holds no surface"):
      data(source=source).dataset()
    with self.assertRaisesRegex(ValueError, "fractions=.*add up to 1"):
      data(source=source | dict(fractions=dict(train=0.5)))


if __name__ == "__main__":
  absltest.main()
