# facegen: two commands to start with are `make demo` and `make test`.
# Change what runs with SCALE (smoke, demo, laptop, gpu, paper), SEEDS (how many), JOBS (runs at a time) and FACES (a
# face set of your own: see `facegen inspect`).
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
            $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
SCALE  ?= laptop
SEEDS  ?= 1
JOBS   ?= 2
FACES  ?=
BIN    := .venv/bin
export OMP_NUM_THREADS ?= 1
export PATH := $(CURDIR)/$(BIN):$(PATH)
export MPLBACKEND ?= agg
TORCH  := $(shell sed -n 's/^requirements *=.*\(torch==[^ ]*\).*/\1/p' settings.ini | head -n 1)
INCEPTION := $(shell sed -n 's/^inception_requirements *= *//p' settings.ini)
CHAPTERS_AND_FIGURES := $(filter-out nbs/runs/%,$(wildcard nbs/*.ipynb nbs/*/*.ipynb))

.PHONY: help setup inception demo study samples figures notebooks lab test export table clean

help:      ## say what can be made
	@grep -hE '^[a-z]+: .*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

setup: .venv/ready  ## make the virtual environment (about 2 GB)
.venv/ready: settings.ini setup.py
	@[ -n "$(PYTHON)" ] || { echo 'facegen needs Python 3.11 or newer, and python3.11, python3.12, python3.13 and python3 are not: install one, or name it with `make setup PYTHON=...`.' >&2; exit 1; }
	@echo "Setting up .venv from the pins in settings.ini: one to five minutes, about 2 GB."
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check $(TORCH)
	$(BIN)/pip install --disable-pip-version-check -e '.[dev]'
	@touch $@

inception: setup  ## add the Inception network of FID, without torchvision, whose builds do not fit every torch
	$(BIN)/pip install --disable-pip-version-check --no-deps $(INCEPTION)

demo: SCALE = demo
demo: setup  ## three ways of conditioning a denoiser, in the folder demo: train, measure, compare with the committed results
	@$(BIN)/facegen demo --scale $(SCALE)

study: setup  ## run every experiment at SCALE with SEEDS seeds, then the figures
	@$(BIN)/facegen study $(SCALE) --seeds $(SEEDS) --jobs $(JOBS) --faces '$(FACES)'

samples: setup  ## make the samples that are not in git, by running again what drew them
	@$(BIN)/facegen samples $(SCALE)

figures: setup  ## plot every figure again from data/results
	@$(BIN)/facegen figures $(SCALE) --jobs $(JOBS)

table: setup  ## print the table of results
	@$(BIN)/facegen table $(SCALE)

notebooks: setup  ## run every chapter and figure in place and save its small outputs
	@for nb in $(CHAPTERS_AND_FIGURES); do echo $$nb; env -u MPLBACKEND $(BIN)/jupyter execute --inplace $$nb 2>/dev/null || exit 1; done
	@$(BIN)/nbdev_clean

lab: setup  ## open the chapters in JupyterLab
	@cd nbs && ../$(BIN)/jupyter lab

export: setup  ## write facegen/ from nbs/ and clean the notebooks
	@$(BIN)/nbdev_export && $(BIN)/nbdev_clean

test: setup  ## check the style of all code, then run every test and every notebook
	@$(BIN)/ruff check nbs facegen tests
	@$(BIN)/pytest -n $(JOBS) --durations=8 tests

clean:  ## delete what runs made (packed faces, weights, executed notebooks); keep committed results
	rm -rf data/faces data/latents data/runs demo .snakemake data/*/_* figures/_*
