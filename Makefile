# make train   sets up .venv, trains the small SSA model on Python's own source text, and
#              prints its perplexity under full and sparse inference
# make test    sets up .venv and runs the tests; make lint checks style alone
#
# PYTHON=... picks the interpreter, EXTRA=cuda12|cuda13|cpu the device (else found out).

PYTHON ?= $(firstword $(foreach p,python3 python3.14 python3.13 python3.12,$(shell \
  $(p) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null && echo $(p))))
# The CUDA release that the driver speaks; none where no NVIDIA GPU is visible.
CUDA := $(shell nvidia-smi 2>/dev/null | sed -n 's/.*CUDA Version: \([0-9]*\).*/\1/p')
EXTRA ?= $(if $(CUDA),$(if $(filter 12,$(CUDA)),cuda12,cuda13),cpu)
WORKDIR ?= runs/smoke

RUN := .venv/bin/python
JOBS ?= 2

# cpu-dev -> [dev], cuda13-dev -> [cuda13,dev], cpu -> nothing at all.
comma := ,
space := $(subst ,, )
listed = $(subst $(space),$(comma),$(filter-out cpu,$(subst -, ,$(1))))
extras = $(if $(call listed,$(1)),[$(call listed,$(1))])

.PHONY: train test lint
.DELETE_ON_ERROR:

train: .venv/ready-$(EXTRA)
	$(RUN) train.py --config=configs/smoke.py --workdir=$(WORKDIR)
	$(RUN) eval.py --workdir=$(WORKDIR) --budgets=32,64,128 --max_rows=512

# Files start in the order of tests/conftest.py, not those of most tests first.
test: .venv/ready-$(EXTRA)-dev
	$(RUN) -m pytest -n $(JOBS) --dist=loadfile --no-loadscope-reorder

lint: .venv/ready-$(EXTRA)-dev
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "error: sparsejax needs Python 3.12 or newer and found \
	none; install one and pass it as make PYTHON=/path/to/python3.12"; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { echo "error: \
	$(PYTHON) is older than Python 3.12; pass another as make PYTHON=..."; exit 2; }
	$(PYTHON) -m venv .venv

.venv/ready-%: pyproject.toml constraints.txt | .venv/bin/python
	@echo "installing for $* into .venv"
	$(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt \
	  -e ".$(call extras,$*)"
	@touch $@
