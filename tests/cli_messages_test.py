"""What the commands say to the mistakes that their users make."""

import contextlib
import functools
import io
import json
import os
import pathlib
import re
import sys
import tempfile
import types
from unittest import mock

from absl import app, flags
from absl.testing import absltest, parameterized

from bertjax import cli, evals, evaluate, expressions, plan, records, train
from bertjax.data import bert_instances
from bertjax.data.beam import __main__ as beam
from bertjax.metrics import writers
from bertjax.predict import __main__ as predict_command
from bertjax.predict.requests import Field, requests_of
from gcp import jobs

_CONFIG = """
import ml_collections
def get_config(variant='tiny'):
  if variant != 'tiny':
    raise ValueError(f'{variant} is unknown; choose from tiny.')
  return ml_collections.ConfigDict(dict(seed=0, model=dict(size=variant)))
"""


class MessagesTest(parameterized.TestCase):
  def setUp(self):
    super().setUp()
    self.root = pathlib.Path(
      self.enterContext(tempfile.TemporaryDirectory())
    ).resolve()

  def config(self, path):
    given = flags.FlagValues()
    cli.define_config(given)
    given(["train", f"--config={path}"])
    return cli.config(given)

  def test_a_config_that_is_not_there_is_named_in_one_line(self):
    path = self.root / "nothing.py"
    with self.assertRaisesRegex(
      ValueError, rf"\A--config={path} cannot be read: .*No such file.*\Z"
    ):
      self.config(path)
    path.write_text("def get_config():\n  return {'seed': 3}\n")
    self.assertEqual(self.config(path)["seed"], 3)

  def test_overrides_are_parsed_with_the_other_flags(self):
    path = self.root / "config.py"
    path.write_text("def get_config():\n  return {'seed': 3, 'prng': 'rbg'}")
    file = self.root / "flags"
    file.write_text("--config.optim.clip_norm=1\n")
    given = flags.FlagValues()
    cli.define_config(given)
    with mock.patch.object(flags, "FLAGS", given):
      rest = cli.parse_flags(
        [
          "train",
          "--config.seed=4",
          f"--config={path}",
          "--config.optim.name=a=b,c",
          f"--flagfile={file}",
          "text",
        ]
      )
    self.assertEqual(rest, ["train", "text"])
    self.assertEqual(
      cli.config(given),
      {"seed": 4, "prng": "rbg", "optim": {"name": "a=b,c", "clip_norm": 1}},
    )

  def parse(self, *arguments, text=_CONFIG):
    """What `parse_flags` says to a config of two fields and these."""
    path = self.root / "config.py"
    path.write_text(text)
    # What is loaded keeps the functions of the config before.
    sys.modules.pop("config_config", None)
    given = flags.FlagValues()
    cli.define_config(given)
    for flag in (app.HelpFlag(), app.HelpfullFlag()):
      flags.DEFINE_flag(flag, given)
    flags.DEFINE_integer("num_rows", 1, "", lower_bound=1, flag_values=given)
    argv = ["train", f"--config={path}", *arguments]
    argv = [part.replace("CONFIG", str(path)) for part in argv]
    told = io.StringIO()
    with (
      mock.patch.object(sys, "argv", argv),
      mock.patch.object(flags, "FLAGS", given),
      mock.patch.object(app, "FLAGS", given),
      contextlib.redirect_stderr(told),
      self.assertRaisesRegex(SystemExit, "1"),
    ):
      cli.parse_flags(argv)
    return told.getvalue()

  @parameterized.parameters(
    (
      "--config.seed",
      "--config.seed has no value; write --config.seed=VALUE.",
    ),
    ("--config=CONFIG:tny", "tny is unknown; choose from tiny."),
  )
  def test_a_mistake_in_a_config_or_an_override_is_one_line(
    self, argument, message
  ):
    self.assertEqual(self.parse(argument), f"Error: {message}\n")

  @parameterized.parameters(
    ("x = 1\na page: of text", ", line 2 is no Python (invalid syntax);"),
    ("x = 3", " has no function get_config;"),
  )
  def test_a_file_that_is_no_config_is_one_line(self, text, message):
    hint = "name a config file, as configs/bert.py:tiny."
    self.assertEqual(
      self.parse(text=text),
      f"Error: --config: {self.root / 'config.py'}{message} {hint}\n",
    )

  @parameterized.parameters(
    ("{}['modle']", KeyError), ("[].modle", AttributeError)
  )
  def test_a_bug_of_the_config_itself_keeps_its_traceback(self, bug, error):
    path = self.root / "config.py"
    path.write_text(f"def get_config():\n  return {bug}\n")
    given = flags.FlagValues()
    cli.define_config(given)
    with (
      mock.patch.object(flags, "FLAGS", given),
      self.assertRaisesRegex(error, "modle"),
    ):
      cli.parse_flags(["train", f"--config={path}"])

  @parameterized.parameters(
    (
      "--num_row=3",
      "Unknown command line flag 'num_row'. Did you mean: num_rows ?",
    ),
    ("--num_rows=0", "flag --num_rows=0: 0 is not a positive integer"),
    ("--num_rows", "Missing value for flag --num_rows"),
  )
  def test_a_mistake_beside_an_override_is_one_line(self, argument, message):
    self.assertEqual(
      self.parse("--config.seed=1", argument), f"Error: {message}\n"
    )

  @parameterized.parameters(
    ("--help", "Try --helpfull"), ("--helpfull", "--num_rows")
  )
  def test_help_is_printed_beside_an_override(self, argument, text):
    told = io.StringIO()
    with contextlib.redirect_stdout(told):
      self.assertEqual(self.parse("--config.seed=1", argument), "")
    self.assertIn(text, told.getvalue())

  def test_help_lists_the_flags_that_commands_share(self):
    of_train = flags.FLAGS.get_key_flags_for_module("bertjax.train")
    help_of = {flag.name: flag.help for flag in of_train}
    self.assertContainsSubset(
      {
        "config",
        "workdir",
        "coordinator_address",
        "num_processes",
        "process_id",
        "connect_timeout_s",
        "heartbeat_timeout_s",
      },
      help_of,
    )
    self.assertIn("--config.FIELD=VALUE", help_of["config"])

  def test_help_names_what_can_be_chosen(self):
    told = predict_command.usage()
    for name, (what, *_) in predict_command.TASKS.items():
      self.assertRegex(told, rf"\n  {name} +{re.escape(what)}\n")
    told = flags.FLAGS[evaluate._EVALUATORS.name].help
    for name in evals.EVALUATORS:
      # It compares the devices of a run, which a saved model has not.
      self.assertEqual(name in told, name != "replicas", name)
    with self.assertRaisesRegex(ValueError, "'replicas' compares .* of a run"):
      evaluate.evaluate("nowhere", evaluators=["objective", "replicas"])

  @parameterized.parameters(
    ("{name: x}", "--source={name: x} is no JSON: Expecting property name"),
    ('["x"]', '--source=\\["x"\\] must be a JSON object'),
  )
  def test_a_flag_that_is_no_json_object_is_named(self, text, message):
    with self.assertRaisesRegex(ValueError, message):
      cli.json_object("source", text)
    self.assertIsNone(cli.json_object("source", None))
    given = {"name": "text_files"}
    self.assertEqual(cli.json_object("source", json.dumps(given)), given)

  def test_an_output_that_cannot_be_written_is_refused_before_the_work(self):
    with self.assertRaisesRegex(ValueError, f"no folder {self.root / 'no'}"):
      cli.check_output("output", f"{self.root}/no/vectors.npy")
    with self.assertRaisesRegex(ValueError, "is a folder; name a file"):
      cli.check_output("output", str(self.root))
    held = self.root / "vectors.npy"
    held.write_text("")
    for path, patch in (
      ("/proc/vectors.npy", contextlib.nullcontext()),
      (held, mock.patch.object(os, "access", return_value=False)),
    ):
      with (
        patch,
        self.assertRaisesRegex(
          ValueError, f"--output={path} cannot be written"
        ),
      ):
        cli.check_output("output", str(path))
    cli.check_output("output", str(held))
    cli.check_output("output", f"{self.root}/new.npy")
    self.assertLen([*self.root.iterdir()], 1)
    cli.check_output("output", None)

  def test_a_path_may_begin_at_home(self):
    with mock.patch.dict(os.environ, HOME="/home/me"):
      for flag in (train._WORKDIR, evaluate._MODEL):
        parse = flags.FLAGS[flag.name].parser.parse
        self.assertEqual(parse("~/x"), "/home/me/x")
        self.assertEqual(parse("x/~"), "x/~")
        self.assertEqual(parse("gs://x/~"), "gs://x/~")

  @parameterized.parameters(
    (beam, {"output", "shared"}),
    (bert_instances, {"output", "vocab"}),
    (jobs, {"output"}),
    (plan, {"json"}),
  )
  def test_so_may_those_of_other_commands(self, command, names):
    with (
      mock.patch.object(cli, "define_config"),
      mock.patch.object(command, "flags") as defined,
    ):
      command._define_flags()
    calls = [call.args for call in defined.DEFINE.call_args_list]
    self.assertEqual({x[1] for x in calls if x[0] is cli.PATH}, names)

  def test_a_workdir_that_cannot_be_written_is_refused_before_the_work(self):
    (self.root / "file").touch()
    for path, where in (
      (pathlib.Path("/proc/x/y"), "/proc: No such"),
      (self.root / "file" / "x", f"{self.root}/file: Not a directory"),
    ):
      message = rf"workdir={path} cannot be created \({where}.*; name another"
      with self.assertRaisesRegex(ValueError, message):
        train.train({}, path)
    with self.assertRaisesRegex(ValueError, "/proc cannot be written"):
      records.check_writable(pathlib.Path("/proc"))
    records.check_writable(self.root / "new" / "run")
    self.assertLen([*self.root.iterdir()], 1)

  def test_a_workdir_that_is_a_file_is_refused_before_the_work(self):
    path = self.root / "file"
    path.write_text("")
    with self.assertRaisesRegex(ValueError, f"workdir={path} is a file"):
      train.train({}, path)

  def test_a_split_of_which_nothing_is_read_is_refused(self):
    with self.assertRaisesRegex(ValueError, "num_batches=0 must be at least 1"):
      evals.EVALUATORS["objective"](
        objective=None, data=None, mesh=None, num_batches=0
      )

  def test_texts_that_are_no_text_are_named(self):
    path = self.root / "texts.txt"
    path.write_bytes(b"caf\xe9\n")
    with self.assertRaisesRegex(ValueError, f"{path} is not UTF-8 text"):
      asked = types.SimpleNamespace(text=[], pair=[], file=path)
      requests_of(asked, [Field("text")])

  def requests(
    self,
    name="texts.txt",
    content=None,
    text=(),
    pair=(),
    stdin=b"",
    task="fill_mask",
  ):
    path = self.root / name
    if content is not None:
      path.write_bytes(content)
    file = None if content is None else path
    asked = types.SimpleNamespace(text=[*text], pair=[*pair], file=file)
    with mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))):
      requests = requests_of(asked, predict_command.TASKS[task][1])
    return [next(iter(request.values())) for request in requests]

  def test_a_line_ends_at_a_line_feed_alone(self):
    text = "a\u2028b\fc\rd"
    lines = f"{text}\r\nend".encode()
    self.assertEqual(self.requests(content=lines), [text, "end"])
    self.assertEqual(self.requests(stdin=lines + b"\n"), [text, "end"])
    objects = '{"text": "a\u2028b"}\n'.encode()
    self.assertEqual(self.requests("a.jsonl", objects), ["a\u2028b"])

  def test_a_mark_of_the_order_of_bytes_is_no_text(self):
    for name, lines in (("a.txt", "a\nb"), ("a.jsonl", '{"text": "a"}')):
      marked = lines.encode("utf-8-sig")
      self.assertEqual(self.requests(name, marked)[0], "a")

  def test_an_empty_file_is_not_a_wish_to_read_standard_input(self):
    with self.assertRaisesRegex(ValueError, "Nothing is asked; give --text"):
      self.requests(content=b"", stdin=b"else")

  @parameterized.parameters(
    (dict(content=b"a\n \nb\n"), "texts.txt, line 2"),
    (dict(stdin=b"a\n\n"), "standard input, line 2"),
    (dict(text=["a", ""]), "--text number 2"),
    (dict(name="a.jsonl", content=b'{"text": "a"}\n\n'), "a.jsonl, line 2"),
    (dict(name="a.jsonl", content=b'{"text": ""}\n'), "a.jsonl, line 1"),
  )
  def test_an_empty_text_is_refused_where_it_stands(self, given, where):
    with self.assertRaisesRegex(ValueError, f"{where}: the text is empty"):
      self.requests(**given)

  @parameterized.parameters(
    ("classify", '{"text": null}', "text=null must be a text"),
    ("classify", '{"text": "a", "pair": null}', "pair=null must be a text"),
    ("embed", '{"text": 5}', "text=5 must be a text"),
    ("embed", '{"text": ["a", "b"]}', r'text=\["a", "b"\] must be a text'),
    ("tag", '{"words": ["a", 5]}', "text=.* a text or a list of words"),
    ("tag", '{"text": []}', "the text is empty"),
    ("choose", '{"text": "a", "endings": "b"}', '="b" must be a list of texts'),
    ("choose", '{"text": "a"}', "no 'endings' .a list of texts.; it has"),
    ("answer", '{"question": "a"}', "no 'context' .a text, as of --pair."),
    (
      "classify",
      '{"text": "a", "pair": "b"}\n{"text": "c"}',
      "line 2 has no 'pair' .a text, as of --pair.; it has 'text'",
    ),
  )
  def test_fields_that_a_task_needs_are_texts(self, task, lines, message):
    where = f"{self.root}/x.jsonl, "
    with self.assertRaisesRegex(ValueError, f"^{where}.*{message}"):
      self.requests("x.jsonl", lines.encode(), task=task)

  @parameterized.parameters(
    ("answer", dict(text=["a"]), "--text number 1 has no 'context'.*--pair"),
    ("choose", dict(text=["a"], pair=["b"]), "must be a list of texts"),
    ("choose", dict(stdin=b"a"), "standard input, line 1 has no 'endings'"),
    ("tag", dict(), "Nothing is asked; give --text"),
  )
  def test_what_flags_do_not_give_is_named(self, task, given, message):
    with self.assertRaisesRegex(ValueError, message):
      self.requests(task=task, **given)

  def test_what_a_task_reads_is_asked(self):
    for task, lines, want in (
      ("tag", '{"words": ["a", "b"]}\n{"text": "c"}', [["a", "b"], "c"]),
      ("choose", '{"text": "a", "endings": ["b", "c"], "id": null}', ["a"]),
      ("classify", '{"text": "a"}', ["a"]),
      ("classify", '{"text": "a", "pair": ""}', ["a"]),
    ):
      self.assertEqual(
        self.requests("x.jsonl", lines.encode(), task=task), want
      )

  def predict(self, *arguments):
    """What the command says to these before it loads a model."""
    given, told = flags.FlagValues(), io.StringIO()
    own = types.SimpleNamespace(
      FLAGS=given, ArgumentSerializer=flags.ArgumentSerializer
    )
    for name in dir(flags):
      if name.startswith("DEFINE"):
        define = functools.partial(getattr(flags, name), flag_values=given)
        setattr(own, name, define)
    stop = ValueError("All flags are right.")
    with (
      mock.patch.object(predict_command, "flags", own),
      mock.patch.object(predict_command, "load_model", side_effect=stop),
      mock.patch.multiple(cli, quiet=mock.DEFAULT, keep_compiled=mock.DEFAULT),
      contextlib.redirect_stderr(told),
      self.assertRaisesRegex(SystemExit, "1"),
    ):
      predict_command._define_flags()
      predict_command.main(given(["predict", "--model=m", *arguments]))
    return told.getvalue()

  @parameterized.parameters(
    (
      "classify --text=a --max_length=8",
      "--max_length is for embed, not class",
    ),
    (
      "fill_mask --text=a --max_length=16",
      "--max_length is for embed, not fill",
    ),
    ("tag --text=a --nonormalize", "--normalize is for embed, not tag"),
    (
      "classify --text=a --input=x.obj",
      "--input is for tokenize_points, class",
    ),
    (
      "classify_points --input=x.obj --file=x",
      "--file is for fill_mask, embed",
    ),
    ("classify_points --input=x.obj --truncate", "--truncate is for fill_mask"),
    (
      "tokenize_points --input=x.obj --reconstruction=r.obj",
      "--reconstruction=r.obj must end in .npy or .ply.",
    ),
    ("embed --text=a --max_length=8 --truncate --dtype=bfloat16", "All flags"),
    ("classify_points --input=x.obj --votes=3 --batch_size=2", "All flags"),
  )
  def test_a_flag_that_a_task_does_not_read_is_refused(self, line, message):
    said = self.predict(*line.split())
    self.assertStartsWith(said, f"Error: {message}")
    self.assertEqual([*predict_command.FLAGS_OF], [*predict_command.TASKS])

  def test_an_expression_that_is_none_is_quoted(self):
    with self.assertRaisesRegex(
      ValueError, r"init_from\.ignore: '\(' is no regular expression: missing"
    ):
      expressions.regex("(", "init_from.ignore")

  def test_errors_of_the_file_system_are_one_line(self):
    path = self.root / "file"
    path.write_text("")
    for act in (
      lambda: (path / "x").mkdir(),
      lambda: path.mkdir(),
      lambda: self.root.read_text(),
    ):
      with self.assertRaisesRegex(SystemExit, "1"), cli.clear_errors():
        act()

  def test_a_package_that_is_not_there_is_one_line(self):
    told = io.StringIO()
    with (
      mock.patch.dict(sys.modules, {"wandb": None}),
      contextlib.redirect_stderr(told),
      self.assertRaisesRegex(SystemExit, "1"),
      cli.clear_errors(),
    ):
      writers.open_writers(self.root, ["wandb"])
    self.assertRegex(told.getvalue(), r"\AError: .* pip install wandb\.\n\Z")


if __name__ == "__main__":
  absltest.main()
