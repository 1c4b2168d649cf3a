# Everything a newcomer needs: `make demo` shows a working system, `make test` proves it.
# Each target makes .venv and installs what it needs, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check

# A file of tests stays on one worker: what it shares is made once.
PYTEST := -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

# Whether shapes and types are checked in every call of a test, which takes a tenth of the time.
CHECK_TYPES := 0

.PHONY: demo test test-all test-newest test-oldest test-export fuzz lint format docs wheel clean

demo: $(VENV)/.runtime
	$(BIN)/python -m mros_jax.train --config configs/demo.py --workdir runs/demo

# Without PyTorch, in minutes; `make test-all` has all tests. CONTRIBUTING.md says what is slow.
test: $(VENV)/.test
	MROS_CHECK_TYPES=$(CHECK_TYPES) $(BIN)/python $(PYTEST) -m "not slow"

# The same with shapes and types checked in every call; then what it leaves out, and with PyTorch
# what it compared with recorded numbers.
test-all: CHECK_TYPES := 1
test-all: test $(VENV)/.test-all
	$(BIN)/python $(PYTEST) -m "slow or pytorch"

# On the newest released packages, under a newer Python where there is one: see .ci/newest.
test-newest:
	.ci/newest

# On the lower bounds of pyproject.toml. What old packages warn of is nothing to us.
test-oldest: $(VENV)-oldest/.test
	MROS_CHECK_TYPES=$(CHECK_TYPES) $(VENV)-oldest/bin/python $(PYTEST) -m "not slow" \
		-p no:cacheprovider -W default

# ONNX files, in a .venv of their own: jax2onnx wants an older Orbax than the newest.
test-export: $(VENV)-export/.test
	$(VENV)-export/bin/python $(PYTEST) -p no:cacheprovider tests/export/test_onnx.py

# Damaged files of every kind for a minute; `make test` tries each for some seconds.
fuzz: $(VENV)/.test
	MROS_FUZZ_SECONDS=60 $(BIN)/python $(PYTEST) \
		tests/test_fuzz.py tests/test_data/test_fuzz.py

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The pages and an API reference as a site, build/site/index.html; a broken link fails it.
docs: $(VENV)/.docs
	$(BIN)/sphinx-build -q -W --keep-going -c docs -b html . build/site

wheel: $(VENV)/bin/python
	$(PIP) build
	$(BIN)/python -m build --outdir build/dist

clean:
	rm -rf $(VENV) build docs/api runs .pytest_cache .mypy_cache .ruff_cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[report,tensorboard]'
	touch $@

$(VENV)/.test: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[test]'
	touch $@ $(VENV)/.runtime

$(VENV)/.test-all: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[test-all]'
	touch $@ $(VENV)/.test $(VENV)/.runtime

$(VENV)/.dev: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[test,dev]'
	touch $@ $(VENV)/.test $(VENV)/.runtime

$(VENV)-oldest/.test: pyproject.toml .ci/oldest.py
	$(PYTHON) -m venv $(VENV)-oldest
	$(PYTHON) .ci/oldest.py > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint $(VENV)-oldest/constraints.txt --editable '.[test]'
	touch $@

$(VENV)-export/.test: pyproject.toml
	$(PYTHON) -m venv $(VENV)-export
	$(VENV)-export/bin/python -m pip install --quiet --disable-pip-version-check \
		--editable '.[test,export]'
	touch $@

$(VENV)/.docs: pyproject.toml | $(VENV)/bin/python
	$(PIP) --editable '.[docs,report,tfds]'
	touch $@ $(VENV)/.runtime
