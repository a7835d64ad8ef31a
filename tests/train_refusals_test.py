"""Training refuses what is wrong in a config, naming the field."""

import pathlib

from absl.testing import absltest, parameterized

from bertjax import train
from tests import tiny


class RefusalTest(tiny.CorpusTestCase):
  @parameterized.parameters(
    (dict(model=dict(max_positions=16)), "data.seq_len=32 exceeds .*=16"),
    (dict(model=dict(vocab_size=5)), "model.vocab_size=5 is smaller than"),
    (dict(model=dict(num_heads=5)), "num_heads=5 does not divide"),
    (dict(model=dict(name="brt")), "model.name='brt' is unknown.*bert"),
    (dict(model=dict(norm="rms")), "model.norm='rms' is unknown"),
    (dict(model=dict(activation="gelo")), "model.activation='gelo'"),
    (dict(model=dict(remat="all")), "model.remat='all' is unknown"),
    (dict(model=dict(size="huge")), "model.size='huge' is unknown"),
    (dict(objective=dict(name="clm")), "objective.name='clm' is unknown"),
    (dict(objective=dict(pair_task="nps")), "objective.pair_task='nps'"),
    (
      dict(objective=dict(pair_task="nsp")),  # the rows are packed
      "objective.name='masked_lm' reads pair_labels, which these data do not",
    ),
    (dict(optim=dict(name="lamp")), "optim.name='lamp' is unknown"),
    (dict(optim=dict(schedule=dict(name="lin"))), "schedule.name='lin'"),
    (dict(data=dict(batch_size=12)), "batch_size=12 .*8 batch shards"),
    (dict(microbatches=3), "microbatches=3 does not divide"),
    (dict(mesh=dict(model=3)), "does not divide 8 devices"),
    (dict(data=dict(splitter="words")), "data.splitter='words' is unknown"),
    (dict(data=dict(source=dict(name="txt"))), "data.source.name='txt'"),
    (dict(data=dict(instances=dict(name="nps"))), "instances.name='nps'"),
    (dict(data=dict(tokenizer=dict(name="hub"))), "tokenizer.name='hub'"),
    (dict(evals=dict(heldout=dict(name="glue"))), "evals.heldout.name='glue'"),
    (dict(evals=dict(heldout=dict(split="dev"))), "split='dev' is unknown"),
    (dict(dtype="half"), "dtype='half' is unknown.*float16"),
    (dict(optim=dict(loss_scale={})), "loss_scale: dtype='float32' has"),
    (dict(prng="philox"), "prng='philox' is unknown"),
    (
      dict(stop=dict(target=dict(metric="held/x", value=1))),
      "evals='held' is unknown.*'heldout'",
    ),
    (dict(stop=dict(epoch=3)), "stop='epoch' is unknown"),
    (dict(stop=dict(epochs=0)), "stop.epochs=0 must be a positive"),
    (dict(objective=dict(name="span_qa")), "span_qa' learns from labelled"),
    (dict(every=dict(save=3)), "every='save' is unknown"),
    (dict(every=dict(log=0)), "every.log=0 must be a positive"),
  )
  def test_a_bad_config_is_refused_by_field(self, changes, message):
    with self.assertRaisesRegex(ValueError, message):
      train.train(
        tiny.small(self.root, **changes),
        self.create_tempdir().full_path,
        dry_run=True,
      )

  def test_an_empty_corpus_is_refused(self):
    folder = pathlib.Path(self.create_tempdir())
    (folder / "corpus.txt").write_text("\n\n")
    with self.assertRaisesRegex(ValueError, "empty|no example|no text"):
      train.train(tiny.config(folder), folder / "run")


if __name__ == "__main__":
  absltest.main()
