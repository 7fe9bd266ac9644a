# Everything runs in .venv, which `make setup` builds from the pinned versions in constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: setup demo test check torture wheel-demo gguf docs docs-serve format table study optimizers adapters clean

setup: $(VENV)/ready

# torch first: with it in place no other package pulls another build of it.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.12 ...")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/preceptor demo --replace

test: setup
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

# Hostile input at random, TIMES as many cases as the tests try, and others; runs that are killed, and disks that are
# full, at every file operation. A few hours; SURVIVAL=5 takes every tenth operation. benchmarks/results/torture.json is
# written by the second; the third takes every model, mode and strategy over several processes, 20 steps each, and the
# other tests that have a long form.
TIMES ?= 100
SURVIVAL ?= 100
torture: setup
	PRECEPTOR_TORTURE=$(TIMES) nice $(BIN)/python -m pytest tests/fuzz
	PRECEPTOR_TORTURE=$(SURVIVAL) nice $(BIN)/python -m pytest tests/train/test_survival.py tests/train/test_survival_ranks.py
	PRECEPTOR_TORTURE=1 nice $(BIN)/python -m pytest \
		tests/train/test_same_losses.py tests/model/test_compiled.py tests/model/test_sharding.py tests/plan tests/chat/test_alignment.py
	$(MAKE) wheel-demo

# The wheel in an environment with nothing else runs the demo, as after `pip install`, in WHEEL_PYTHON; and all extras go
# with the pinned versions.
WHEEL_PYTHON ?= $(PYTHON)
wheel-demo:
	rm -rf build/wheel && mkdir -p build/wheel
	git archive HEAD | tar -x -C build/wheel
	$(WHEEL_PYTHON) -m venv build/wheel/venv
	build/wheel/venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	build/wheel/venv/bin/pip wheel --quiet --disable-pip-version-check --no-deps --wheel-dir build/wheel/dist build/wheel
	build/wheel/venv/bin/pip install --quiet --disable-pip-version-check -c constraints.txt build/wheel/dist/*.whl
	cd build/wheel && PYTHONPATH= nice venv/bin/preceptor demo --out demo --questions 100
	build/wheel/venv/bin/pip check
	build/wheel/venv/bin/pip install --quiet --disable-pip-version-check --dry-run -c constraints.txt \
		"$$(echo build/wheel/dist/*.whl)[docs,lm-eval,mlflow,quantized,serve,tensorboard,trackio,wandb]"

# Exports to GGUF and Ollama, read and answered by llama.cpp, which is built first: about 15 minutes on 2 cores.
LLAMA := llama_cpp_python-0.3.36
gguf: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[gguf]'
	test -d build/$(LLAMA) || { $(BIN)/python -m pip download --quiet --no-deps --no-binary :all: --dest build \
		llama-cpp-python==0.3.36 && tar -xf build/$(LLAMA).tar.gz -C build; }
	LLAMA_CPP=build/$(LLAMA)/vendor/llama.cpp $(BIN)/python -m pytest tests/export

# The site from docs/, in build/site; a broken link is an error.
docs: setup
	$(BIN)/mkdocs build --strict

docs-serve: setup
	$(BIN)/mkdocs serve

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The full table of the first run: base, tuned model and control on every held-out question.
table: setup
	$(BIN)/python benchmarks/first_run.py

# docs/study.md: base and intern, the LIMA curve, the tax and what lowers it, the shift; under 30 minutes on 2 cores.
# Interrupted, it goes on where it was; what has been measured is kept in runs/study.
study: setup
	$(BIN)/python experiments/study.py

# The tables of docs/optimizers.md, about 25 minutes on 2 cores; it goes on where it was.
optimizers: setup
	$(BIN)/python experiments/optimizers.py
	$(BIN)/python docs/make_settings_pages.py

# The table of docs/adapters.md, about 10 minutes on 2 cores; it goes on where it was.
adapters: setup
	$(BIN)/python experiments/adapters.py
	$(BIN)/python docs/make_settings_pages.py

clean:
	rm -rf $(VENV) build *.egg-info src/*.egg-info .pytest_cache .ruff_cache .mypy_cache
