# Each target does all its own set-up: `make demo` and `make test` work on a fresh checkout.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
STAMP  := $(VENV)/.installed

.PHONY: demo test docs lint bench fuzz zoo clean

demo: $(STAMP)
	$(BIN)/dq-plugins demo --out demo-report

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal --durations=15

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet --site-dir site

bench: $(STAMP)
	$(BIN)/python -m benchmarks

# changed files of every kind are read: half an hour; FUZZ="--engine atheris" lets coverage steer (pip install atheris)
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz $(FUZZ)

# every architecture of diffusers, tiny and random, through all stages; writes docs/zoo.md
zoo: $(STAMP)
	$(BIN)/python -m benchmarks.zoo

# torch first and pinned: every other package then accepts the build that is already there
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) demo-report
