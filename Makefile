VENV ?= .venv
PYTHON ?= python3
RUN = $(VENV)/bin/python
INSTALL = $(RUN) -m pip install --quiet --no-compile
CORES = -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo check test proof gpu bench sweep readme notebooks setup help

demo: $(VENV)/demo  ## install what it needs, pre-train, evaluate, draw (default)
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

$(VENV)/installed: requirements.txt $(VENV)/demo
	$(RUN) -c "import torchvision" 2>/dev/null || $(RUN) -m pip uninstall --quiet --yes torch torchvision
	$(INSTALL) -r requirements.txt
	touch $@

# Where there is no NVIDIA GPU, torch for CPUs takes a sixth of the disk. It is taken from pip's own
# index or from CPU_INDEX, if one has it; PyPI has none for Linux. `make setup` also needs
# torchvision of the same build; the demo does not.
CPU_INDEX ?= https://download.pytorch.org/whl/cpu
FOR_CPUS = torch
$(VENV)/installed: FOR_CPUS = torchvision

$(VENV)/demo: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	@if ! nvidia-smi -L && ! $(RUN) -m pip show torch; then \
		for index in "" --extra-index-url=$(CPU_INDEX); do \
			$(RUN) -m pip index versions --timeout 5 --retries 0 $$index $(FOR_CPUS) \
				| grep -o '[0-9.]*+cpu' | sed "s|^|$$index $(FOR_CPUS)==|;q" | grep . && break; \
		done; \
	fi >$(VENV)/build 2>/dev/null || true
	$(INSTALL) -e .[demo] $$(cat $(VENV)/build)
	touch $@

help:  ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' Makefile | expand -t 11
