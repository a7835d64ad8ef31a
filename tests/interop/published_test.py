"""Published folders: `transformers` reads ours, we read theirs."""

import io
import json
import os
import pathlib
import pickle
import tempfile
import zipfile

from absl.testing import absltest, parameterized

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import ml_dtypes
import numpy as np
import safetensors.numpy
import torch
import transformers

from bertjax import interop
from bertjax.interop import model_spec, tensors, torch_files
from tests.interop import toy


class FolderTestCase(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(self.enterContext(tempfile.TemporaryDirectory()))

  def write(self, folder, spec, params, tokenizer=None, **options):
    interop.write_huggingface(
      self.root / folder, spec, params, tokenizer, **options
    )
    return self.root / folder


class HuggingFaceTest(FolderTestCase):
  @parameterized.parameters(
    ("BertForPreTraining", ("mlm_head", "pooler", "pair_head")),
    ("BertForMaskedLM", ("mlm_head",)),
    ("BertForNextSentencePrediction", ("pooler", "pair_head")),
    ("BertModel", ("pooler",)),
    ("BertModel", ()),
    ("RobertaForMaskedLM", ("mlm_head",)),
    ("RobertaModel", ("pooler",)),
  )
  def test_transformers_reads_what_we_write_and_back(self, name, heads):
    family = "roberta" if name.startswith("Roberta") else "bert"
    spec = toy.spec(family)
    params = toy.params(spec, heads)
    ours = self.write("ours", spec, params)
    model, report = getattr(transformers, name).from_pretrained(
      ours, output_loading_info=True
    )
    missing = set(report["missing_keys"])
    if name == "BertModel" and not heads:
      missing -= {"pooler.dense.weight", "pooler.dense.bias"}
    self.assertEmpty(missing)
    self.assertEmpty(report["unexpected_keys"])
    self.assertEqual(
      json.loads((ours / "config.json").read_text())["architectures"], [name]
    )
    if name == "BertModel" and not heads:
      return
    model.save_pretrained(self.root / "theirs")
    again = interop.read_huggingface(self.root / "theirs")
    toy.assert_same_trees(params, again.params)
    self.assertEqual(model_spec.resolve(again.spec), spec)

  @parameterized.product(
    name=("BertForPreTraining", "BertForMaskedLM", "BertModel"),
    scan=(True, False),
  )
  def test_their_file_comes_back_bit_for_bit(self, name, scan):
    config = transformers.BertConfig(
      vocab_size=31, hidden_size=12, num_hidden_layers=2,
      num_attention_heads=3, intermediate_size=20, max_position_embeddings=9,
      hidden_act="gelu_new",
    )  # fmt: skip
    getattr(transformers, name)(config).save_pretrained(self.root / "theirs")
    found = interop.read_huggingface(self.root / "theirs", scan=scan)
    self.assertEqual("layers" in found.params["encoder"], scan)
    ours = self.write("ours", found.spec, found.params)
    theirs = tensors.read_weights(self.root / "theirs")
    written = tensors.read_weights(ours)
    self.assertEqual(set(theirs), set(written))
    for key in theirs:
      self.assertEqual(theirs[key].tobytes(), written[key].tobytes(), key)
    wanted = json.loads((self.root / "theirs" / "config.json").read_text())
    config = json.loads((ours / "config.json").read_text())
    for key in config:
      if key != "bos_token_id":
        self.assertEqual(config[key], wanted[key], key)

  @parameterized.parameters(
    ("huggingface", "sop", "sop"),
    ("huggingface", "nsp", "nsp"),
    ("huggingface", None, "nsp"),
    ("tf1", "sop", "sop"),
    ("tf1", None, "nsp"),
  )
  def test_what_the_head_of_pairs_learned_is_kept(self, layout, task, want):
    spec = toy.spec(activation="gelu_tanh")
    objective = dict(name="masked_lm", pair_task=task)
    write = getattr(interop, f"write_{layout}")
    write(self.root / "m", spec, toy.params(spec), None, objective=objective)
    found = getattr(interop, f"read_{layout}")(self.root / "m")
    self.assertEqual(found.objective, dict(name="masked_lm", pair_task=want))
    if layout == "huggingface":
      transformers.BertForPreTraining.from_pretrained(self.root / "m")
      card = (self.root / "m" / "README.md").read_text()
      self.assertEqual("| sop, not NSP |" in card, task == "sop")

  @parameterized.parameters("bfloat16", "float16")
  def test_sixteen_bit_files_keep_their_bits(self, dtype):
    spec = toy.spec()
    first = self.write("first", spec, toy.params(spec), dtype=dtype)
    found = interop.read_huggingface(first)
    self.assertEqual(found.dtype, dtype)
    second = self.write("second", spec, found.params, dtype=found.dtype)
    self.assertEqual(
      (first / "model.safetensors").read_bytes(),
      (second / "model.safetensors").read_bytes(),
    )
    key = "bert.pooler.dense.bias"
    want = transformers.BertForPreTraining.from_pretrained(first).state_dict()
    np.testing.assert_array_equal(
      want[key].float().numpy(), found.params["pooler"]["dense"]["bias"]
    )

  def test_shards_and_torch_files_hold_the_same_model(self):
    spec = toy.spec()
    params = toy.params(spec)
    folder = self.write("ours", spec, params)
    model = transformers.BertForPreTraining.from_pretrained(folder)
    model.save_pretrained(self.root / "shards", max_shard_size="4KB")
    self.assertTrue(
      (self.root / "shards" / "model.safetensors.index.json").exists()
    )
    found = interop.read_huggingface(self.root / "shards")
    toy.assert_same_trees(params, found.params)
    # A torch file also repeats the decoder and may hold transposed views.
    (folder / "model.safetensors").unlink()
    state = model.state_dict()
    key = "bert.pooler.dense.weight"
    state[key] = state[key].t().contiguous().t()
    torch.save(state, folder / "pytorch_model.bin")
    found = interop.read_huggingface(folder)
    toy.assert_same_trees(params, found.params)

  def test_a_missing_shard_is_named(self):
    spec = toy.spec()
    model = transformers.BertForPreTraining.from_pretrained(
      self.write("ours", spec, toy.params(spec))
    )
    model.save_pretrained(self.root / "shards", max_shard_size="4KB")
    shard = sorted((self.root / "shards").glob("model-*"))[0]
    shard.unlink()
    with self.assertRaisesRegex(ValueError, f"{shard.name} is missing"):
      interop.read_huggingface(self.root / "shards")

  @parameterized.parameters("bert", "roberta")
  def test_the_tokenizer_reads_text_as_ours_does(self, family):
    spec = toy.spec(family, max_positions=40)
    ours = toy.word_tokenizer() if family == "bert" else toy.byte_tokenizer()
    folder = self.write("m", spec, toy.params(spec, ("mlm_head",)), ours)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    text, second = "The cats sat, the dog!", "a mat."
    a, b = ours.encode(text).tolist(), ours.encode(second).tolist()
    cls, sep = ours.cls_id, ours.sep_id
    self.assertEqual(theirs(text)["input_ids"], [cls, *a, sep])
    between = [sep, sep] if family == "roberta" else [sep]
    pair = theirs(text, second)
    self.assertEqual(pair["input_ids"], [cls, *a, *between, *b, sep])
    if family == "bert":
      types = [0] * (len(a) + 2) + [1] * (len(b) + 1)
      self.assertEqual(pair["token_type_ids"], types)
    else:
      self.assertNotIn("token_type_ids", pair)
    self.assertEqual(theirs.mask_token_id, ours.mask_id)
    self.assertEqual(theirs.pad_token_id, ours.pad_id)
    self.assertEqual(theirs.model_max_length, 40)
    model = transformers.AutoModelForMaskedLM.from_pretrained(folder)
    batch = theirs([text, second], padding=True, return_tensors="pt")
    self.assertEqual(model(**batch).logits.shape[-1], spec["vocab_size"])
    again = interop.read_huggingface(folder).tokenizer
    np.testing.assert_array_equal(again.encode(text), a)

  @parameterized.named_parameters(
    ("family", {"model_type": "albert"}, "model_type='albert'"),
    ("positions", {"position_embedding_type": "relative_key"}, "relative_key"),
    ("decoder", {"is_decoder": True}, "is_decoder=True"),
    ("untied", {"tie_word_embeddings": False}, "tie_word_embeddings=False"),
    ("activation", {"hidden_act": "mish"}, "hidden_act='mish' is unknown"),
    ("missing", {"hidden_size": ...}, "hidden_size is missing"),
    ("width", {"hidden_size": 24}, "wrong shapes: .* instead of"),
  )
  def test_what_bertjax_does_not_have_is_refused_by_name(self, change, message):
    spec = toy.spec()
    folder = self.write("m", spec, toy.params(spec))
    config = json.loads((folder / "config.json").read_text()) | change
    config = {k: v for k, v in config.items() if v is not ...}
    (folder / "config.json").write_text(json.dumps(config))
    with self.assertRaisesRegex(ValueError, message):
      interop.read_huggingface(folder)

  @parameterized.named_parameters(
    ("pre_norm", "bert", {"norm": "pre"}, "model.norm='pre'"),
    ("types", "bert", {"num_types": 0}, "model.num_types=0"),
    ("positions", "bert", {"positions": "both"}, "model.positions='both'"),
    ("offset", "roberta", {"position_offset": 1}, "position_offset=1"),
  )
  def test_what_hugging_face_does_not_have_is_refused(
    self, name, options, message
  ):
    spec = toy.spec(name)
    params = toy.params(spec, ())
    with self.assertRaisesRegex(ValueError, message):
      self.write("m", spec | options, params)
    self.assertFalse((self.root / "m").exists())

  def test_roberta_with_a_pair_head_has_no_published_class(self):
    spec = toy.spec("roberta")
    with self.assertRaisesRegex(ValueError, "no model with the heads"):
      self.write("m", spec, toy.params(spec))

  def test_a_folder_with_content_is_never_written_to(self):
    spec = toy.spec()
    (self.root / "m").mkdir()
    (self.root / "m" / "notes.txt").write_text("mine")
    with self.assertRaisesRegex(ValueError, "not empty"):
      self.write("m", spec, toy.params(spec))

  def test_damaged_and_absent_files_are_named(self):
    spec = toy.spec()
    folder = self.write("m", spec, toy.params(spec))
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[:-50])
    with self.assertRaisesRegex(ValueError, "not a whole safetensors file"):
      interop.read_huggingface(folder)
    (folder / "model.safetensors").unlink()
    with self.assertRaisesRegex(ValueError, "holds no weights"):
      interop.read_huggingface(folder)
    (folder / "config.json").write_text("{")
    with self.assertRaisesRegex(ValueError, "config.json is not JSON"):
      interop.read_huggingface(folder)


class Mischief:
  def __reduce__(self):
    return os.system, ("touch /nowhere/else",)


class TorchFileTest(FolderTestCase):
  def save(self, value, **options):
    path = self.root / "pytorch_model.bin"
    torch.save(value, path, **options)
    return path

  def test_every_dtype_and_layout_is_torchs(self):
    base = torch.arange(24.0).reshape(4, 6)
    state = {
      str(t): base.to(t)
      for t in (torch.float32, torch.float64, torch.float16, torch.bfloat16,
                torch.int64, torch.int32, torch.uint8, torch.bool)
    }  # fmt: skip
    state |= {
      "view": base[1:, 2:4],
      "transposed": base.t(),
      "scalar": torch.tensor(3.5),
      "empty": torch.zeros(0, 3),
      "parameter": torch.nn.Parameter(base * 2),
    }
    found = tensors.read_torch_file(self.save(state))
    self.assertEqual(set(found), set(state))
    for name, want in state.items():
      if want.dtype == torch.bfloat16:
        self.assertEqual(found[name].dtype, ml_dtypes.bfloat16)
        want = want.float()
      np.testing.assert_array_equal(
        found[name].astype("f8"), want.detach().numpy().astype("f8")
      )

  def test_a_pickle_that_runs_code_is_not_opened(self):
    path = self.save({"weight": torch.zeros(2), "extra": Mischief()})
    with self.assertRaisesRegex(ValueError, "wants to run .*system.*no tensor"):
      tensors.read_torch_file(path)

  @parameterized.parameters("state_dict", "base_model", "model_state_dict")
  def test_what_scripts_save_beside_a_state_dict_is_stepped_over(self, key):
    weight = torch.arange(3.0)
    accuracy = np.float64(0.9)  # as of sklearn, and of `np.mean`
    path = self.save(
      {"metrics": {"acc": accuracy, "n": np.int64(3)}, key: {"w": weight}}
    )
    self.assertEqual([*tensors.read_torch_file(path)], ["w"])
    # NumPy 1, with which most files were written, has another name for them.
    old = self.root / "old.bin"
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(old, "w") as target:
      for name in source.namelist():
        content = source.read(name)
        if name.endswith("data.pkl"):
          self.assertIn(b"numpy._core.multiarray\n", content)
          content = content.replace(b"numpy._core.", b"numpy.core.")
        target.writestr(name, content)
    np.testing.assert_array_equal(tensors.read_torch_file(old)["w"], weight)
    with self.assertRaisesRegex(ValueError, "state dict of named tensors"):
      tensors.read_torch_file(self.save({"w": weight, "acc": accuracy}))

  def test_torch_reads_what_is_written_without_it(self):
    base = np.arange(24.0, dtype=np.float32).reshape(4, 6)
    state = {
      "matrix": base,
      "transposed": base.T,  # in memory column by column
      "view": base[1:3, ::2],
      "wide name é": np.arange(3, dtype=np.int64),
      "number": np.array(7, np.int64),
      "empty": np.zeros((0, 5), np.float32),
    }
    path = self.root / "made.pth"
    torch_files.write_torch_file(state, path, "base_model")
    (key,), (found,) = zip(*torch.load(path, weights_only=True).items())
    self.assertEqual(key, "base_model")
    self.assertEqual(list(found), list(state))
    ours = tensors.read_torch_file(path)
    for name, x in state.items():
      self.assertTrue(found[name].is_contiguous(), name)
      for mine in (found[name].numpy(), ours[name]):
        self.assertEqual(mine.dtype, x.dtype)
        self.assertEqual(mine.shape, x.shape)
        np.testing.assert_array_equal(mine, x)
    with self.assertRaisesRegex(ValueError, "half is float16; float32, int64"):
      torch_files.write_torch_file({"half": base.astype("f2")}, path, "model")

  def test_the_old_format_is_refused_with_advice(self):
    path = self.save(
      {"weight": torch.zeros(2)}, _use_new_zipfile_serialization=False
    )
    with self.assertRaisesRegex(ValueError, "PyTorch 1.6 and later"):
      tensors.read_torch_file(path)

  def test_a_damaged_file_is_refused(self):
    path = self.save({"weight": torch.arange(999)})
    content = path.read_bytes()
    middle = len(content) // 2
    altered = content[:middle] + b"bits" + content[middle + 4 :]
    for bad, message in (
      (altered, "Bad CRC-32"),
      (content[:middle], "not a zip file"),
    ):
      path.write_bytes(bad)
      with self.assertRaisesRegex(ValueError, f"^{path} is .*{message}"):
        tensors.read_torch_file(path)
    path.write_bytes(content)
    with zipfile.ZipFile(path) as source:
      parts = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w") as target:
      for name, part in parts.items():
        target.writestr(name, part.replace(b"weight", b"\xffeight"))
    with self.assertRaisesRegex(ValueError, f"^{path} is damaged: Unicode"):
      tensors.read_torch_file(path)

  @parameterized.parameters(
    "{", "[]", "{}", '{"weight_map": ["a"]}', '{"metadata": {}}'
  )
  def test_an_index_that_lists_no_files_is_refused(self, text):
    index = self.root / "pytorch_model.bin.index.json"
    index.write_text(text)
    with self.assertRaisesRegex(ValueError, f"{index} is no JSON of .*_map"):
      tensors.read_weights(self.root)

  def test_a_tensor_beyond_its_storage_is_refused(self):
    good = self.save({"weight": torch.zeros(2)})
    bad = self.root / "bad.bin"
    with zipfile.ZipFile(good) as source, zipfile.ZipFile(bad, "w") as target:
      for name in source.namelist():
        content = source.read(name)
        if name.endswith("data.pkl"):
          # The shape (2,) is two bytes: BININT1 2, TUPLE1.
          self.assertEqual(content.count(b"K\x02\x85"), 1)
          content = content.replace(b"K\x02\x85", b"K\x63\x85")
        target.writestr(name, content)
    with self.assertRaisesRegex(ValueError, "beyond its storage"):
      tensors.read_torch_file(bad)

  def test_other_content_is_refused(self):
    with self.assertRaisesRegex(ValueError, "state dict of named tensors"):
      tensors.read_torch_file(self.save([torch.zeros(2)]))
    path = self.root / "other.bin"
    with zipfile.ZipFile(path, "w") as archive:
      archive.writestr("x/readme", "hello")
    with self.assertRaisesRegex(ValueError, "not one of torch.save"):
      tensors.read_torch_file(path)

  def test_the_unpickler_admits_no_builtin(self):
    payload = io.BytesIO(pickle.dumps({"a": print}))
    with self.assertRaisesRegex(ValueError, "builtins.print"):
      tensors._TensorUnpickler(payload, np.zeros, "FILE").load()


class ReleaseTest(FolderTestCase):
  """The layout of the original releases, through TensorFlow itself."""

  def test_write_and_read_keep_every_bit(self):
    spec = toy.spec(activation="gelu_tanh")
    params = toy.params(spec)
    vocab = toy.word_tokenizer()
    interop.write_tf1(self.root / "r", spec, params, vocab)
    config = json.loads((self.root / "r" / "bert_config.json").read_text())
    self.assertEqual(config["hidden_act"], "gelu")
    found = interop.read_tf1(self.root / "r")
    toy.assert_same_trees(params, found.params)
    self.assertEqual(model_spec.resolve(found.spec), spec)
    np.testing.assert_array_equal(
      found.tokenizer.encode("the cats"), vocab.encode("the cats")
    )

  def test_the_erf_form_is_remembered(self):
    spec = toy.spec(activation="gelu")
    with self.assertLogs(level="WARNING") as logs:
      interop.write_tf1(self.root / "r", spec, toy.params(spec), None)
    self.assertIn("tanh form", logs.output[0])
    found = interop.read_tf1(self.root / "r")
    self.assertEqual(found.spec["activation"], "gelu")

  def test_what_the_original_code_lacks_is_refused(self):
    spec = toy.spec("roberta")
    with self.assertRaisesRegex(ValueError, "'bert' with 1e-12 only"):
      interop.write_tf1(self.root / "r", spec, toy.params(spec), None)


class SafetensorsTest(FolderTestCase):
  def test_files_carry_the_metadata_that_transformers_asks_for(self):
    spec = toy.spec()
    folder = self.write("m", spec, toy.params(spec))
    with safetensors.safe_open(folder / "model.safetensors", "np") as file:
      self.assertEqual(file.metadata(), {"format": "pt"})
    card = (folder / "README.md").read_text()
    self.assertIn("BertForPreTraining", card)
    self.assertIn(f"{toy.count(toy.params(spec)):,}", card)


if __name__ == "__main__":
  absltest.main()
