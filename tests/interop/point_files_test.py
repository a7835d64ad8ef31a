"""Released files of Point-BERT become our models."""

import functools
import pathlib

import jax
import numpy as np
import torch
from absl.testing import absltest, parameterized
from torch import nn

from bertjax import convert, loading, transfer
from bertjax.interop import point_bert_files
from bertjax.models import MODELS
from bertjax.objectives import OBJECTIVES
from bertjax.objectives.frozen import frozen_variables, with_frozen
from tests import jitted
from tests.models import torch_point_bert as theirs
from tests.models.point_tokenizer_test import TorchGraph

G, M, E, L, F, V, C, K = 64, 32, 64, 2, 12, 16, 6, 8


class Graph(TorchGraph):
  """The transcription under the names of the released files."""

  def __init__(self, inside, out):
    super().__init__(inside, out)
    layers = [(getattr(self, f"edge_{i}"), getattr(self, f"edge_{i}_norm"))
              for i in range(4)]  # fmt: skip
    layers.append((self.output, self.output_norm))
    self.input_trans = self.input
    for i, layer in enumerate(layers, 1):
      setattr(self, f"layer{i}", nn.Sequential(*layer))
    self.own = set(dict(self.named_children())) - {
      "input_trans", *(f"layer{i}" for i in range(1, 6)),
    }  # fmt: skip


class Folding(nn.Module):
  def __init__(self):
    super().__init__()
    self.mlp = nn.Sequential(
      nn.Linear(F, 1024), nn.ReLU(), nn.Linear(1024, 1024), nn.ReLU(),
      nn.Linear(1024, 3 * M // 4),
    )  # fmt: skip
    self.final_conv = nn.Sequential(
      nn.Conv1d(F + 5, 512, 1), nn.BatchNorm1d(512), nn.ReLU(),
      nn.Conv1d(512, 512, 1), nn.BatchNorm1d(512), nn.ReLU(),
      nn.Conv1d(512, 3, 1),
    )  # fmt: skip


class Tokenizer(nn.Module):
  def __init__(self):
    super().__init__()
    self.encoder = theirs.TorchPatches(F)
    self.dgcnn_1, self.dgcnn_2 = Graph(F, V), Graph(F, F)
    self.codebook = nn.Parameter(torch.randn(V, F))
    self.decoder = Folding()

  def logits(self, patches, centres):
    return self.dgcnn_1(self.encoder(patches), centres)


def tokenizer_state(module, prefix=""):
  """Without the names that the transcription has beside the released ones."""
  return {
    prefix + name: x.detach().clone()
    for name, x in module.state_dict().items()
    if not name.startswith(tuple(
      f"dgcnn_{i}.{child}." for i in (1, 2) for child in module.dgcnn_1.own
    ))
  }  # fmt: skip


def heads(trunk):
  trunk.lm_head = nn.Linear(E, V)
  trunk.cls_head = nn.Sequential(nn.Linear(E, C), nn.GELU(), nn.Linear(C, C))
  return trunk


class FilesTest(parameterized.TestCase):
  @classmethod
  def setUpClass(cls):
    super().setUpClass()
    torch.manual_seed(0)
    folder = cls.folder = cls.enter_folder()
    cls.tokenizer = theirs.shaken(Tokenizer()).eval()
    cls.q = theirs.shaken(heads(theirs.TorchTrunk(L, E, 1, F, mask=True)))
    cls.q.eval()
    cls.k = heads(theirs.TorchTrunk(L, E, 1, F, mask=True))
    state = {
      **{f"transformer_q.{k}": v for k, v in cls.q.state_dict().items()},
      **{f"transformer_k.{k}": v for k, v in cls.k.state_dict().items()},
      **tokenizer_state(cls.tokenizer, "dvae."),
      "queue": torch.randn(C, K),
      "queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    cls.files = {
      "tokenizer": tokenizer_state(cls.tokenizer),
      "pretrained": {f"module.{k}": v for k, v in state.items()},
    }
    for name, tensors in cls.files.items():
      metrics = {"acc": np.float64(0.5)}  # as of their linear SVM
      saved = {"base_model": tensors, "epoch": 3, "metrics": metrics}
      torch.save(saved, f"{folder}/{name}.pth")
    rng = np.random.default_rng(0)
    cls.cloud = rng.normal(size=(2, 90, 3)).astype(np.float32)
    cls.patches = [
      torch.from_numpy(np.array(x)) for x in jitted.group(cls.cloud, G, M)[:2]
    ]

  @classmethod
  def enter_folder(cls):
    import tempfile

    return cls.enterClassContext(tempfile.TemporaryDirectory())

  @classmethod
  @functools.cache  # which traces for seconds
  def load(cls, name):
    return loading.load_model(f"{cls.folder}/{name}.pth")

  def test_tokenizer(self):
    model = self.load("tokenizer")
    self.assertEqual(model.spec["patch_size"], M)
    patches = jitted.group(self.cloud, G, M)
    found = jitted.apply(
      model.objective,
      model.variables,
      patches,
      method=lambda o, p: o.encoder.logits(p),
    )
    with torch.no_grad():
      expected = self.tokenizer.logits(*self.patches)
    np.testing.assert_allclose(found, expected, atol=1e-4)

  def test_pretrained(self):
    model = self.load("pretrained")
    self.assertEqual(model.heads, {"token_head", "contrast_head"})
    found = jitted.apply(
      model.objective,
      model.variables,
      {"points": self.cloud},
      method="outputs",
    )
    with torch.no_grad():
      hidden = self.q.norm(self.q.states(*self.patches)[-1])
      logits = self.q.lm_head(hidden[:, 1:])
    np.testing.assert_allclose(found["hidden"], hidden, atol=1e-4)
    np.testing.assert_allclose(found["token_logits"], logits, atol=1e-4)
    # Its tokenizer is the one beside it.
    (teacher,) = frozen_variables(model.extra).values()
    alone = self.load("tokenizer")
    jax.tree.map(
      np.testing.assert_array_equal,
      teacher["params"],
      alone.params["encoder"],
    )
    _, metrics = jitted.apply(
      model.objective,
      model.variables,
      {"points": self.cloud},
      train=False,
    )
    self.assertGreater(metrics["tokens_loss"][1], 0)

  def test_fine_tuning_starts_from_all_but_the_heads(self):
    encoder = MODELS["point_bert"](
      num_layers=L, emb_dim=E, num_heads=1, patch_features=F
    )
    objective = OBJECTIVES["point_classification"](
      encoder=encoder, num_classes=3
    )
    batch = {"points": self.cloud, "labels": np.zeros(2, np.int32)}
    target = jax.eval_shape(
      lambda b: objective.init(jax.random.key(0), b, train=False), batch
    )
    from flax import linen

    found = transfer.load_variables_for(
      f"{self.folder}/pretrained.pth",
      linen.meta.unbox(target),
      fresh=objective.fresh,
    )
    model = self.load("pretrained")
    self.assertIsNone(found["params"]["classifier"]["dense"]["kernel"])
    for collection in ("params", "batch_stats"):
      expected = dict(model.variables[collection]["encoder"])
      expected["embeddings"] = (
        {k: v for k, v in expected["embeddings"].items() if k != "mask"}
        if "embeddings" in expected
        else {}
      )
      jax.tree.map(
        np.testing.assert_array_equal, found[collection]["encoder"], expected
      )

  def written(self, path):
    found = torch.load(path, weights_only=True)["base_model"]
    self.assertTrue(all(x.is_contiguous() for x in found.values()))
    return found

  def assert_same_tensors(self, found, expected):
    expected = {
      k.removeprefix("module."): x
      for k, x in expected.items()
      if not k.endswith("num_batches_tracked")
    }
    self.assertEqual(set(found), set(expected))
    for name, x in expected.items():
      self.assertEqual(found[name].dtype, x.dtype)
      self.assertEqual(found[name].shape, x.shape, name)
      self.assertTrue(torch.equal(found[name], x), name)

  def test_a_tokenizer_is_written_as_it_was_read(self):
    target = pathlib.Path(self.folder) / "again.pth"
    done = convert.convert(
      f"{self.folder}/tokenizer.pth", target, format="point_bert"
    )
    self.assertEqual(done.origin, "point_bert")
    self.assert_same_tensors(self.written(target), self.files["tokenizer"])
    with self.assertRaisesRegex(ValueError, "again.pth is there already"):
      convert.convert(
        f"{self.folder}/tokenizer.pth", target, format="point_bert"
      )

  def test_a_pretrained_model_is_written_with_what_a_run_begins_with(self):
    target = pathlib.Path(self.folder) / "more.pth"
    convert.convert(
      f"{self.folder}/pretrained.pth", target, format="point_bert"
    )
    found = self.written(target)
    expected = {
      k.removeprefix("module."): x for k, x in self.files["pretrained"].items()
    }
    fresh = ("queue", "queue_ptr", "transformer_k.")
    self.assertEqual(found["queue"].shape, expected["queue"].shape)
    np.testing.assert_allclose(found["queue"].norm(dim=0), 1, atol=1e-5)
    for name, x in found.items():
      if name.startswith("transformer_k."):
        self.assertTrue(torch.equal(x, found[name.replace("_k.", "_q.")]))
    self.assert_same_tensors(
      {k: x for k, x in found.items() if not k.startswith(fresh)},
      {k: x for k, x in expected.items() if not k.startswith(fresh)},
    )
    # Their own classes take it, nothing missing and nothing left over.
    trunk = heads(theirs.TorchTrunk(L, E, 1, F, mask=True))
    trunk.load_state_dict(
      {
        k.removeprefix("transformer_k."): x
        for k, x in found.items()
        if k.startswith("transformer_k.")
      }
    )

  def test_a_run_is_written_with_its_slow_encoder_and_its_queue(self):
    model = self.load("pretrained")
    rng = np.random.default_rng(0)
    slow = {
      name: jax.tree.map(lambda x: 2 * np.array(x), model.params[name])
      for name in ("encoder", "contrast_head")
    }
    keys = rng.normal(size=(K, C)).astype(np.float32)
    (teacher,) = frozen_variables(model.extra).values()
    coding = {
      name: {k: v for k, v in tree.items() if k not in ("from_codes", "decode")}
      for name, tree in teacher.items()
    }
    variables = with_frozen(model.variables, {"tokenizer": coding})
    variables |= {
      "momentum": {"slow": {"params": slow, "updated": 6}},
      "queue": {"queue": {"keys": keys, "next": 3}},
    }
    path = f"{self.folder}/new/run.pth"  # in a folder that is made for it
    point_bert_files.write(path, model.spec, model.objective_spec, variables)
    found = self.written(path)
    np.testing.assert_array_equal(found["queue"], keys.T)
    self.assertEqual(found["queue_ptr"].tolist(), [3])
    for name, factor in (
      ("blocks.blocks.1.attn.qkv.weight", 2),
      ("cls_head.2.bias", 2),
      ("lm_head.weight", 1),  # has no slow copy
    ):
      np.testing.assert_array_equal(
        found[f"transformer_k.{name}"], factor * found[f"transformer_q.{name}"]
      )
    self.assertIn("dvae.dgcnn_1.layer5.0.weight", found)
    self.assertNotIn("dvae.dgcnn_2.layer5.0.weight", found)
    again = self.load("new/run")
    jax.tree.map(np.testing.assert_array_equal, again.params, model.params)
    (teacher,) = frozen_variables(again.extra).values()
    jax.tree.map(np.testing.assert_array_equal, teacher, coding)
    spec = model.spec | {"patch_size": 16}
    with self.assertRaisesRegex(ValueError, "patch_size=16: without the tok"):
      point_bert_files.write(
        f"{self.folder}/no.pth", spec, model.objective_spec, variables
      )

  def test_what_cannot_be_written(self):
    model = self.load("pretrained")
    params = {k: v for k, v in model.params.items() if k != "contrast_head"}
    arguments = model.spec, model.objective_spec
    for path, variables, message in (
      ("a.bin", model.variables, "a.bin must end in .pth or .pt"),
      ("a.pth", model.variables | {"params": params}, "always has a contrast"),
    ):
      with self.assertRaisesRegex(ValueError, message):
        point_bert_files.write(f"{self.folder}/{path}", *arguments, variables)
    with self.assertRaisesRegex(ValueError, "reads points; .*, point_bert"):
      convert.convert(
        f"{self.folder}/tokenizer.pth", "new", format="huggingface"
      )

  def test_another_file_is_refused(self):
    torch.save({"weight": torch.zeros(2)}, f"{self.folder}/other.pth")
    with self.assertRaisesRegex(
      ValueError, "other.pth is no checkpoint of Point-BERT: it has no transf"
    ):
      self.load("other")
    broken = dict(self.files["tokenizer"])
    broken.pop("decoder.mlp.2.bias")
    torch.save({"base_model": broken}, f"{self.folder}/broken.pth")
    with self.assertRaisesRegex(ValueError, "missing tensors: decoder.mlp.2"):
      self.load("broken")


if __name__ == "__main__":
  absltest.main()
