# make quickstart   environment, then a small BERT on real text (minutes)
# make test         the default test suite
# make typecheck    annotations against what the tests of parts call them with
# make lint         ruff
# make bench        speed against PyTorch, of reading, compiling, and on paper
#                   of a TPU (18 min); runs/bench.json, and a line in
#                   benchmarks/history.jsonl
# make bench-kernels  kernels against the stock ones, compiled, not run (30 min)
# A distribution's Python is compiled for speed, pyenv's usually not: the tests take
# a seventh longer with it. One without ensurepip makes no environment.
PYTHON ?= $(shell for version in 3.11 3.12; do \
  for python in /usr/bin/python$$version python$$version; do \
    $$python -c 'import ensurepip' 2>&- && echo $$python && exit; \
  done; done; echo python3.11)
VENV ?= .venv
RUN := $(VENV)/bin/python
WORKDIR ?= runs/quickstart
# Workers of `test` and `typecheck`; auto: one per core that has 4 GB.
JOBS ?= auto
# The quickstart is for any machine; JAX_PLATFORMS=tpu or cuda where there is one.
export JAX_PLATFORMS ?= cpu

.PHONY: quickstart test typecheck lint bench bench-kernels clean

$(VENV)/core: setup.py
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet --disable-pip-version-check -e .
	touch $@

$(VENV)/test: $(VENV)/core
	$(RUN) -m pip install --quiet --disable-pip-version-check -e '.[test]'
	touch $@

quickstart: $(VENV)/core
	$(RUN) -m bertjax.train --config=configs/quickstart.py --workdir=$(WORKDIR)
	$(RUN) -m bertjax.predict fill_mask --model=$(WORKDIR) \
	  --text="Return a new [MASK] with the given shape and dtype."

test: $(VENV)/test
	$(RUN) -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder -m "not slow"

# Not in `test`: what users run is not decorated, and tests named ill_typed pass
# an argument of another type on purpose, to read the message.
TYPECHECKED := $(addprefix tests/,layers objectives metrics tasks \
  data/tokenizers data/masking_test.py data/dataset_test.py \
  data/sentences_test.py data/abstract_test.py optim/schedules_test.py)
typecheck: $(VENV)/test
	$(RUN) -m pytest -n $(JOBS) --dist loadfile $(TYPECHECKED) \
	  --jaxtyping-packages=bertjax,tests.typechecker.check \
	  -k "not ill_typed and not LearningTest"

lint: $(VENV)/test
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

bench: $(VENV)/test
	$(RUN) -m benchmarks --json=runs/bench.json

bench-kernels: $(VENV)/test
	$(RUN) -m kernels.bench

clean:
	rm -rf $(VENV) build *.egg-info
