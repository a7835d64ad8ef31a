"""Collections of clouds, written as they are published, are read back."""

import json
import pathlib
import pickle

import h5py
import numpy as np
from absl.testing import absltest

from bertjax.data.shapes import files, hdf5, sources


def rows(seed, columns, count=9):
  values = np.random.default_rng(seed).normal(size=(count, columns))
  return values.astype(np.float32).round(4)


class FilesTest(absltest.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.create_tempdir())

  def write(self, name, text):
    path = self.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path

  def table(self, name, values, delimiter):
    path = self.root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savetxt(path, values, delimiter=delimiter, fmt="%.4f")

  def test_shapenet55(self):
    names = ["03001627-b2.npy", "02691156-a1.npy", "03001627-c3.npy"]
    self.write("ShapeNet-55/train.txt", "\n".join(names[:2]) + "\n")
    self.write("ShapeNet-55/test.txt", names[2] + "\n")
    (self.root / "shapenet_pc").mkdir()
    for number, name in enumerate(names):
      np.save(self.root / "shapenet_pc" / name, rows(number, 3))
    every = files.ShapeNet55(self.root, "all")
    self.assertLen(every, 3)
    self.assertEqual(every.classes, ("02691156", "03001627"))
    self.assertEqual([cloud.label for cloud in every], [1, 0, 1])
    np.testing.assert_array_equal(every[1].points, rows(1, 3))
    self.assertLen(files.ShapeNet55(self.root, "test"), 1)
    with self.assertRaisesRegex(ValueError, "split='tset'.*'test'"):
      files.ShapeNet55(self.root, "tset")
    np.save(self.root / "shapenet_pc" / names[0], rows(0, 2))
    with self.assertRaisesRegex(
      ValueError, r"b2.npy .*\(9, 2\).*\[points, 3\]"
    ):
      files.ShapeNet55(self.root)[0]

  def test_a_number_means_one_class_in_every_split(self):
    self.write("train.txt", "a-1.npy\nb-1.npy\nc-1.npy\n")
    self.write("test.txt", "b-2.npy\nc-2.npy\n")
    self.write("modelnet40_train.txt", "a_1\nb_1\nc_1\n")
    self.write("modelnet40_test.txt", "b_2\nc_2\n")
    for collection in (files.ShapeNet55, files.ModelNet40):
      test = collection(self.root, "test")
      self.assertEqual(test.classes, collection(self.root, "train").classes)
      self.assertEqual(test.labels.tolist(), [1, 2])

  def test_modelnet40(self):
    self.write("modelnet40_train.txt", "night_stand_0001\nbed_0007\n")
    self.write("modelnet40_shape_names.txt", "bed\nchair\nnight_stand\n")
    self.table("night_stand/night_stand_0001.txt", rows(0, 6), ",")
    self.table("bed/bed_0007.txt", rows(1, 6), ",")
    found = files.ModelNet40(self.root)
    self.assertEqual([cloud.label for cloud in found], [2, 0])
    np.testing.assert_allclose(found[0].points, rows(0, 6)[:, :3], atol=1e-6)
    np.testing.assert_allclose(found[0].normals, rows(0, 6)[:, 3:], atol=1e-6)
    with self.assertRaisesRegex(FileNotFoundError, "no modelnet40_test.txt"):
      files.ModelNet40(self.root, "test")
    self.write("modelnet40_train.txt", "sofa_0001\n")
    with self.assertRaisesRegex(ValueError, "'sofa_0001' is of none of the 3"):
      files.ModelNet40(self.root)

  def test_modelnet40_cache(self):
    path = self.root / "modelnet40_train_8192pts_fps.dat"
    clouds, labels = [rows(0, 6), rows(1, 6)], [np.array([4]), np.array([0])]
    path.write_bytes(pickle.dumps([clouds, labels]))
    found = files.ModelNet40Cache(path)
    self.assertEqual([cloud.label for cloud in found], [4, 0])
    np.testing.assert_array_equal(found[1].points, rows(1, 6)[:, :3])
    path.write_bytes(pickle.dumps([clouds, labels[:1]]))
    with self.assertRaisesRegex(ValueError, "2 clouds but 1 labels"):
      files.ModelNet40Cache(path)
    path.write_bytes(pickle.dumps([clouds, pathlib.PurePosixPath("a")]))
    with self.assertRaisesRegex(ValueError, "pathlib.*, not arrays alone"):
      files.ModelNet40Cache(path)

  def test_scanobjectnn(self):
    for number, (home, ending) in enumerate(hdf5.SCAN_VARIANTS.values()):
      path = self.root / home / f"test_{ending}"
      path.parent.mkdir(exist_ok=True)
      with h5py.File(path, "w") as file:
        file["data"] = np.stack([rows(number, 3), rows(number + 5, 3)])
        file["label"] = np.array([3, number], np.int32)
    for number, variant in enumerate(hdf5.SCAN_VARIANTS):
      found = hdf5.ScanObjectNN(self.root, "test", variant)
      self.assertEqual([cloud.label for cloud in found], [3, number])
      np.testing.assert_array_equal(found[0].points, rows(number, 3))
    self.assertLen(found.classes, 15)
    with self.assertRaisesRegex(FileNotFoundError, "training_objectdataset"):
      hdf5.ScanObjectNN(self.root)
    with h5py.File(path, "w") as file:
      file["data"] = rows(0, 3)
      file["label"] = np.zeros(9)
    with self.assertRaisesRegex(ValueError, r"data \(9, 3\)"):
      hdf5.ScanObjectNN(self.root, "test")
    for data, message in (
      (np.zeros((2, 0, 3)), r"data \(2, 0, 3\)"),
      (np.full((2, 9, 3), np.inf), "scale75.h5 holds coordinates that are not"),
    ):
      with h5py.File(path, "w") as file:
        file["data"], file["label"] = data, np.zeros(2)
      with self.assertRaisesRegex(ValueError, message):
        hdf5.ScanObjectNN(self.root, "test")
    with h5py.File(path, "w") as file:
      file["data"] = rows(0, 3)[None]
    with self.assertRaisesRegex(ValueError, "scale75.h5 has no 'data' or no"):
      hdf5.ScanObjectNN(self.root, "test")
    path.write_bytes(path.read_bytes()[:99])
    with self.assertRaisesRegex(ValueError, "scale75.h5 cannot be read: .*tru"):
      hdf5.ScanObjectNN(self.root, "test")

  def test_modelnet40_hdf5(self):
    """As `modelnet40_ply_hdf5_2048` lists its files: from elsewhere."""
    self.write("shape_names.txt", "airplane\nbathtub\nbed\n")
    lines = [f"data/somewhere/ply_data_train{i}.h5\n" for i in (1, 0)]
    self.write("train_files.txt", "".join(lines))
    self.write("test_files.txt", "data/somewhere/ply_data_test0.h5\n")
    for i, labels in enumerate(([2], [0, 1])):
      with h5py.File(self.root / f"ply_data_train{i}.h5", "w") as file:
        file["data"] = np.stack([rows(10 * i + j, 3) for j in labels])
        file["label"] = np.array(labels, np.uint8)[:, None]
    source = sources.modelnet40_hdf5(path=str(self.root))
    found = source.open("train")
    self.assertEqual(found.classes, ("airplane", "bathtub", "bed"))
    self.assertEqual([cloud.label for cloud in found], [0, 1, 2])
    np.testing.assert_array_equal(found.labels, [0, 1, 2])
    for cloud, seed in zip(found, (10, 11, 2)):
      np.testing.assert_array_equal(cloud.points, rows(seed, 3))
    with self.assertRaisesRegex(ValueError, "ply_data_test0.h5 is not there"):
      source.open("test")
    with h5py.File(self.root / "ply_data_test0.h5", "w") as file:
      file["data"], file["label"] = rows(0, 3)[None], np.array([[3]], np.uint8)
    with self.assertRaisesRegex(ValueError, "label 3 is of none of the 3 cla"):
      source.open("test")
    self.write("test_files.txt", "\n")
    with self.assertRaisesRegex(ValueError, "test_files.txt names no file"):
      source.open("test")

  def test_damaged_files_and_empty_lists_are_named(self):
    self.write("train.txt", "1-a.npy\n1-b.npy\n")
    np.save(self.root / "1-a.npy", rows(0, 3))
    whole = (self.root / "1-a.npy").read_bytes()
    for content in (b"", b"no array", whole[:-5]):
      (self.root / "1-b.npy").write_bytes(content)
      with self.assertRaisesRegex(ValueError, "1-b.npy holds no points: "):
        files.ShapeNet55(self.root)[1]
    self.write("modelnet40_train.txt", "bed_0001\n")
    for content, message in (
      ("1,2,3\nx\n", "no points: "),
      ("1,2,nan,0,0,1\n", "coordinates that are not finite"),
    ):
      self.write("bed/bed_0001.txt", content)
      with self.assertRaisesRegex(ValueError, f"bed_0001.txt holds {message}"):
        files.ModelNet40(self.root)[0]
    self.write("bed/bed_0001.txt", "1,2,3,nan,nan,nan\n")  # of a sliver
    self.assertLen(files.ModelNet40(self.root)[0].points, 1)
    for content in (b"", b"no pickle", pickle.dumps([rows(0, 6)])[:40]):
      (self.root / "a.dat").write_bytes(content)
      with self.assertRaisesRegex(ValueError, "a.dat cannot be read: "):
        files.ModelNet40Cache(self.root / "a.dat")
    self.write("test.txt", "\n\n")
    with self.assertRaisesRegex(ValueError, "split 'test' is empty; its list"):
      sources.shapenet55(path=str(self.root)).open("test")
    self.write("synsetoffset2category.txt", "Bag 02773838\nChair\n")
    with self.assertRaisesRegex(ValueError, "category.txt should hold NAME SY"):
      files.ShapeNetPart(self.root)

  def test_shapenet_part(self):
    self.write(
      "synsetoffset2category.txt", "Airplane\t02691156\nBag\t02773838\n"
    )
    for split, model in (("train", "a"), ("val", "b"), ("test", "c")):
      self.write(
        f"train_test_split/shuffled_{split}_file_list.json",
        json.dumps([f"shape_data/02773838/{model}"]),
      )
      self.table(f"02773838/{model}.txt", _with_parts(), " ")
    found = files.ShapeNetPart(self.root)
    self.assertLen(found, 2)
    self.assertEqual(found.classes, ("Airplane", "Bag"))
    self.assertEqual(found[1].label, 1)
    np.testing.assert_array_equal(found[1].parts, np.arange(9) % 4)
    np.testing.assert_allclose(
      found[1].normals, _with_parts()[:, 3:6], atol=1e-6
    )
    self.assertLen(files.ShapeNetPart(self.root, "test"), 1)
    # Other categories, in another order, keep their own parts.
    listed = "synsetoffset2category.txt"
    self.write(listed, "Bag\t02773838\nAirplane\t02691156\n")
    found = files.ShapeNetPart(self.root)
    self.assertEqual(found.class_parts, ((4, 5), (0, 1, 2, 3)))
    self.write(listed, "Bag\t02773838\nSofa\t1\n")
    with self.assertRaisesRegex(
      ValueError, "category.txt, category='Sofa' is unk"
    ):
      files.ShapeNetPart(self.root)


def _with_parts():
  return np.concatenate([rows(2, 6), (np.arange(9) % 4)[:, None]], axis=1)


if __name__ == "__main__":
  absltest.main()
