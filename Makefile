# Every target sets up what it needs. VENV names the virtual environment; PYTHON the interpreter that makes it.
PYTHON ?= python3
VENV ?= .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/.installed
CLIENTS := .venv-clients
EVAL := .venv-eval
VLLM := .venv-vllm
MODEL ?= examples/miniature
SEED ?= 0
RECIPE ?= taught
TRAINED = out/miniature-$(if $(filter-out taught,$(RECIPE)),$(RECIPE)-)$(SEED)
# Towers that are trained already.
TOWERS ?= $(wildcard benchmarks/quality/towers/$(RECIPE)-$(SEED).safetensors)
# glibc would hand every large tensor back to the system and ask for it anew: a tenth of the time. Threads that wait sleep:
# beside other work on two cores, spinning made a step take three times as long.
# PROCESSES (1, 2 or 4) of one thread train the decoder faster than as many threads of one process; a GPU needs no more than one.
PROCESSES ?= $(if $(wildcard /dev/nvidia0),1,2)
FAST := OMP_WAIT_POLICY=PASSIVE MALLOC_MMAP_THRESHOLD_=4000000000 MALLOC_TRIM_THRESHOLD_=8000000000 $(RUN)/python
TRAIN := $(FAST) -m benchmarks.quality
TRAIN_TOGETHER := $(FAST) -m torch.distributed.run --standalone --nproc-per-node $(PROCESSES) -m benchmarks.quality

.PHONY: help setup demo space cards quality miniature retrained test test-fast test-oldest test-clients eval-test vllm-env vllm-test serving-check batch-check lint docs clean
.DEFAULT_GOAL := help

help:  ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

setup: $(STAMP)  ## a virtual environment with the package and its development tools

$(STAMP): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet --upgrade pip
	$(RUN)/python -m pip install --quiet --editable '.[dev]'
	@touch $@

demo: setup  ## ask a drawn scene three questions, unpruned beside pruned, and draw what was kept
	$(RUN)/python -m examples.demo

space: setup  ## the demonstration in the browser, on the miniature; MODEL_ID chooses another checkpoint
	$(RUN)/python examples/space/app.py

cards: setup  ## model cards anew, from what is counted and measured
	$(RUN)/python -m benchmarks.card_facts

quality: setup  ## evaluate MODEL (the miniature) on held-out questions of the drawn world: benchmarks/results
	$(RUN)/ivtp quality --model $(MODEL) --rows all --out benchmarks/results

miniature: setup  ## train a miniature from nothing with SEED by RECIPE (taught, plain), on CPU or GPU; goes on where it was stopped
	$(if $(TOWERS),,$(TRAIN).train_clip --recipe $(RECIPE) --out $(TRAINED)/clip --seed $(SEED))
	$(TRAIN_TOGETHER).train_llava --clip $(or $(TOWERS),$(TRAINED)/clip) --out $(TRAINED)/llava --seed $(SEED)
	$(TRAIN).assemble --clip $(or $(TOWERS),$(TRAINED)/clip) --llava $(TRAINED)/llava --out $(TRAINED)/model

retrained: setup  ## retrain all systems of the tables on MODEL, and the unpruned control as long, with SEED: benchmarks/results
	$(TRAIN).retrain_all --model $(MODEL) --states out/retrained --seed $(SEED)

test: setup  ## all tests
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses 2 --dist loadfile

test-fast: setup  ## the tests that need neither seconds, a process of their own nor a browser; two minutes
	OMP_NUM_THREADS=1 $(RUN)/python -m pytest --numprocesses 2 --dist loadfile -m "not (slow or subprocess or browser)"

test-oldest:  ## all tests with the oldest supported transformers and torch
	PIP_CONSTRAINT=$(CURDIR)/tests/oldest.txt $(MAKE) test VENV=.venv-oldest

test-clients: $(CLIENTS)/.installed  ## short runs of the newest TRL, PEFT, openai, LangChain and LiteLLM, in .venv-clients
	OMP_NUM_THREADS=1 $(CLIENTS)/bin/python -m pytest tests/clients tests/model/test_transformers_suite.py

$(CLIENTS)/.installed: pyproject.toml tests/clients/requirements.txt
	$(PYTHON) -m venv $(CLIENTS)
	$(CLIENTS)/bin/python -m pip install --quiet --upgrade pip
	$(CLIENTS)/bin/python -m pip install --quiet --editable '.[dev]' --requirement tests/clients/requirements.txt
	@touch $@

eval-test: $(EVAL)/.installed  ## tests of evaluation with the newest lmms-eval, in .venv-eval
	OMP_NUM_THREADS=1 $(EVAL)/bin/python -m pytest tests/evaluation

$(EVAL)/.installed: pyproject.toml
	$(PYTHON) -m venv $(EVAL)
	$(EVAL)/bin/python -m pip install --quiet --upgrade pip
	$(EVAL)/bin/python -m pip install --quiet --editable '.[batch,eval]' 'pytest>=8.3,<10'
	@touch $@

vllm-env: $(VLLM)/.installed  ## vLLM for CPUs with the plug-in, in .venv-vllm: 3.5 GB

# torchaudio and torchcodec come built for GPUs and cannot be imported; nothing here needs them.
$(VLLM)/.installed: pyproject.toml tests/vllm_plugin/requirements.txt tests/vllm_plugin/torchvision_operators.py
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet --upgrade pip
	$(VLLM)/bin/python -m pip install --quiet --requirement tests/vllm_plugin/requirements.txt
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	$(VLLM)/bin/python -m pip install --quiet --no-deps --editable .
	cp tests/vllm_plugin/torchvision_operators.py $$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
	echo 'import torchvision_operators' > $$($(VLLM)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/torchvision_operators.pth
	@touch $@

vllm-test:  ## the plug-in and vLLM's server against the transformers engine; skipped where vLLM cannot be installed
	@$(MAKE) --no-print-directory vllm-env || { echo "skipped: vLLM cannot be installed here, for the reason above"; exit 0; }; \
	test ! -e $(VLLM)/.installed || IVTP_TEST_GIB=6 OMP_NUM_THREADS=1 $(VLLM)/bin/python -m pytest tests/vllm_plugin tests/evaluation/test_vllm_answerer.py

serving-check: vllm-env  ## all claims about vLLM on 400 held-out questions, in out/serving-check; goes on where it was stopped
	IVTP_TEST_GIB=6 OMP_NUM_THREADS=1 $(VLLM)/bin/python -m benchmarks.serving.check

batch-check: setup  ## ivtp batch on Ray: two actors against one, ten kills, a node that dies; goes on where it was stopped
	$(RUN)/python -m benchmarks.batch_cluster --work out/batch-check

lint: setup  ## style, types, and the layers of the package
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy
	$(RUN)/lint-imports

docs: setup  ## these pages as a site with an API reference, in build/site; warnings are errors
	rm -rf build/pages build/site
	mkdir -p build/pages/benchmarks build/pages/examples
	cp -R README.md CONTRIBUTING.md CHANGELOG.md docs build/pages
	cp -R benchmarks/README.md benchmarks/results build/pages/benchmarks
	cp -R examples/images build/pages/examples
	$(RUN)/zensical build --clean --strict >build/docs.log 2>&1 || { cat build/docs.log; exit 1; }
	! grep -E '^(griffe|mkdocstrings):' build/docs.log

clean:  ## remove environments and outputs
	rm -rf .venv .venv-ci .venv-clients .venv-eval .venv-vllm .venv-oldest out build dist *.egg-info .import_linter_cache .pytest_cache .mypy_cache .ruff_cache .hypothesis
