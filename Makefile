# Each target does all its own set-up: `make demo` and `make test` work on a fresh checkout.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TORCH  := $(shell sed -n 's/^\(torch==[^ ;]*\).*/\1/p' constraints.txt)
STAMP  := $(VENV)/.installed
DEMO   := $(VENV)/.installed-demo

.PHONY: demo test docs lint bench fuzz zoo compatibility screenshots first-picture clean

demo: $(DEMO)
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

# changed files of every kind are read: minutes; FUZZ="--engine atheris" lets coverage steer (pip install atheris)
fuzz: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python tests/fuzz $(FUZZ)

# every architecture of diffusers, tiny and random, through all stages; writes docs/zoo.md
zoo: $(STAMP)
	$(BIN)/python -m benchmarks.zoo

# other interpreters and releases, in environments of their own: 5 GB of disk, half an hour; writes docs/compatibility.md
compatibility: $(STAMP)
	$(BIN)/python -m benchmarks.compatibility

# torch first and pinned: every other package then accepts the build that is already there
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)"
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	touch $@ $(DEMO)

# what Chromium shows of the report and of the site, in docs/images
screenshots: $(STAMP)
	$(BIN)/python -m benchmarks.screenshots

# seconds from nothing to the first quantized picture, by stage, in a folder of its own
first-picture:
	$(PYTHON) benchmarks/first_picture.py

# what the demo needs and no more; an environment for development has it already
$(DEMO): pyproject.toml constraints.txt
	@echo "1/3 making an environment in $(VENV)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip  # an older one is silent while it unpacks
	@echo "2/3 installing $(TORCH), the largest download"
	$(BIN)/python -m pip install "$(TORCH)"
	@echo "3/3 installing torchao, diffusers and what they need"
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[torchao,diffusers]"
	touch $@

clean:
	rm -rf $(VENV) demo-report
