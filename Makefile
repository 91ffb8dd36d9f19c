# make demo: set up, pre-train on the embedded data, evaluate, draw.  make test: set up, test.
VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python

.PHONY: demo test notebooks proof gpu bench sweep readme setup

demo: setup
	test -f runs/demo/model.pt || $(RUN) train.py
	$(RUN) evaluate.py runs/demo --linear-probe

test: setup
	$(RUN) -m ruff check .
	$(RUN) -m pytest

# Opens Jupyter; set NANOGLIP_QUICK=1 for the tests' small sizes.
notebooks: setup
	$(RUN) -m jupyterlab notebooks

# What takes too long for `make test`; its numbers go to results/.
proof: setup
	$(RUN) -m pytest -m proof
	$(RUN) -m tools.bench
	$(RUN) -m tools.bench zero-shot --rounds 3

# What only a GPU can show; without one each test says that it was skipped.
gpu: setup
	$(RUN) -m pytest -m gpu -rs -s

# Training steps beside open_clip's, in turn: about 40 minutes, with nothing else on the machine.
bench: setup
	$(RUN) tests/benchmark.py

# The comparison of masks in the README and the runs of the notebooks: about six hours on two cores,
# in as many sittings as you like; finished runs are skipped.
sweep: setup
	$(RUN) -m tools.sweep

# Rewrite the README's tables from results/*.json.
readme: setup
	$(RUN) -m tools.tables

setup: $(VENV)/installed

$(VENV)/installed: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@
