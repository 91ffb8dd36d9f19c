VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python
CORES = -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo check test proof gpu bench sweep readme notebooks setup help

demo: setup  ## install, pre-train on the embedded data, evaluate, draw (default)
	test -f runs/demo/model.pt || $(RUN) train.py
	$(RUN) evaluate.py runs/demo --linear-probe

check: setup  ## ruff and the fast tests, between two edits
	$(RUN) -m ruff check .
	$(RUN) -m pytest $(CORES) -m "not slow and not proof and not gpu"

test: setup  ## ruff and all tests that the README rests on
	$(RUN) -m ruff check .
	$(RUN) -m pytest $(CORES)

proof: setup  ## tests and measurements that take longer; numbers go to results/
	$(RUN) -m pytest -m proof
	$(RUN) -m tools.bench
	$(RUN) -m tools.bench decoding
	$(RUN) -m tools.bench zero-shot --rounds 3

gpu: setup  ## tests of an NVIDIA GPU; without one each says that it was skipped
	$(RUN) -m pytest -m gpu -rs -s

bench: setup  ## training steps in turn with open_clip's: 40 minutes on an idle machine
	$(RUN) tests/against_open_clip.py

sweep: setup  ## the comparison of masks and the notebooks' runs: 12 hours on 2 cores, resumable
	$(RUN) -m tools.sweep

readme: setup  ## rewrite the generated tables of README.md and docs/ from results/
	$(RUN) -m tools.tables

notebooks: setup  ## open Jupyter (NANOGLIP_QUICK=1 for the tests' small sizes)
	$(RUN) -m jupyterlab notebooks

setup: $(VENV)/installed  ## install everything into $(VENV)

$(VENV)/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 11
