# The same in plain python and pip words is in README.md; every target here is one or two commands.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# More words for pip, such as PIP_ARGS="--index-url https://your.mirror/simple".
PIP_ARGS ?=

# PyPI's torch for Linux brings several GB of CUDA libraries. Where no NVIDIA driver is found, the CPU
# build is asked for instead; if its index does not answer, pip goes on with the usual one.
# Choose yourself: TORCH_INDEX=https://download.pytorch.org/whl/cpu, or TORCH_INDEX= for PyPI's build.
ifeq ($(shell uname -s),Linux)
TORCH_INDEX ?= $(if $(shell command -v nvidia-smi),,https://download.pytorch.org/whl/cpu)
endif

.DEFAULT_GOAL := help
.PHONY: help setup quickstart check test outputs answers test-rounding test-browser lab bench bench-gpu gpu-check badges bundle toybox

help: ## list these targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 15

setup: $(VENV)/.setup ## make .venv and install the tested versions into it

# The stamp is newer than what it was made from, so a second make does nothing.
$(VENV)/.setup: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip install --no-deps --retries 1 \
		-c constraints.txt --index-url $(TORCH_INDEX) torch \
		|| echo "No answer from $(TORCH_INDEX); taking torch from the usual index.")
	$(BIN)/python -m pip install $(PIP_ARGS) -c constraints.txt -e '.[all]'
	touch $@

quickstart: setup ## teach the toy base a new subject, and show it before and after
	$(BIN)/python -m dbcore quickstart

# Every cell again, its text and images against those that are stored.
REPLAY = $(BIN)/python -m pytest -m "" --nbval --nbval-current-env --nbval-sanitize-with tests/nbval_sanitize.cfg \
	$(NOTEBOOKS)
NOTEBOOKS ?= notebooks

# What a change breaks first: the contract, the files people bring, the mathematics, resuming to the same bits.
CHECKED = tests/utils tests/datasets tests/test_contract.py tests/test_config.py tests/test_made_up_family.py \
	$(addprefix tests/models/test_,process.py base.py lora.py side_by_side.py) \
	$(addprefix tests/engines/test_,exact.py losses.py)

check test test-rounding: export HF_HUB_OFFLINE = 1
check test test-rounding: export TQDM_DISABLE = 1
check: export OMP_NUM_THREADS = 1
check: setup ## lint, types and the tests that matter most, in three minutes: for whoever changes a line
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest $(CHECKED)

# unit tests beside the notebooks: two runs of one thread take less time than one run of two
test: export OMP_NUM_THREADS = 1
test: export NUMBA_NUM_THREADS = 1
test: setup ## lint, types, unit tests, then the notebooks against their stored outputs
	$(BIN)/python -m ruff check .
	$(BIN)/python -m mypy
	$(BIN)/python -m pytest & units=$$!; $(REPLAY); replay=$$?; wait $$units && exit $$replay

outputs: setup ## run the notebooks anew and store what they show, as what make test compares with
	$(BIN)/python tests/store_outputs.py $(NOTEBOOKS)

answers: setup ## ask the toy world the course's questions anew: tables of data/results and notebook 07 (80 minutes)
	$(BIN)/python tests/store_answers.py

test-rounding: setup ## replay the notebooks with one thread, and rounding as an old processor does
	OMP_NUM_THREADS=1 $(REPLAY)
	ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 $(REPLAY)

test-browser: setup ## open the notebooks in JupyterLab and move their controls (needs chromium, chromedriver)
	$(BIN)/python -m pytest -m browser tests/browser

lab: setup ## open the course in JupyterLab
	$(BIN)/python -m jupyter lab notebooks

# More words for it, such as BENCH="--script my/train_dreambooth_lora.py --rounds 5", or BENCH=--growth.
BENCH ?=

bench: setup ## time and memory on this CPU against diffusers' own script
	PYTHONPATH=tests $(BIN)/python -m bench $(BENCH)

bench-gpu: setup ## the same on a GPU, with Stable Diffusion 1.5's shape at 512 pixels
	PYTHONPATH=tests $(BIN)/python -m bench --gpu $(BENCH)

# More words for it, such as GPU_CHECK="--script my/train_dreambooth_lora.py --minutes 5".
GPU_CHECK ?=

gpu-check: ## on a machine with a GPU: its tests, then speed and memory, some eleven minutes on an H100, without network
	PYTHONPATH=.:tests $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m bench.gpu_check $(GPU_CHECK)

badges: ## write REPO=owner/name (on GitHub) into the notebooks' Colab badges and set-up cells
	$(PYTHON) -m dbcore.tools.badges $(REPO)

# For other computers than this one: BUNDLE_FOR="--platform win_amd64 --python-version 3.12 --only-binary=:all:".
BUNDLE_FOR ?=
BUNDLE := build/bundle/dbcore-course

bundle: setup ## dist/dbcore-course.zip: the project and its packages, for a room without network
	rm -rf build/bundle dist/dbcore-course.zip
	mkdir -p $(BUNDLE)/wheelhouse dist
	git archive HEAD | tar -x -C $(BUNDLE)
	mv $(BUNDLE)/notebooks/INSTALL.txt $(BUNDLE)/INSTALL.txt
	$(BIN)/python -m pip wheel $(PIP_ARGS) --no-deps -w $(BUNDLE)/wheelhouse $(BUNDLE)
	$(if $(TORCH_INDEX),$(BIN)/python -m pip download $(BUNDLE_FOR) --no-deps --retries 1 -d $(BUNDLE)/wheelhouse \
		-c constraints.txt --index-url $(TORCH_INDEX) torch || echo "No answer from $(TORCH_INDEX).")
	$(BIN)/python -m pip download $(PIP_ARGS) $(BUNDLE_FOR) -c constraints.txt -d $(BUNDLE)/wheelhouse \
		--find-links $(BUNDLE)/wheelhouse "$$(ls $(BUNDLE)/wheelhouse/dbcore-*.whl)[all]"
	cd build/bundle && $(abspath $(BIN))/python -m zipfile -c ../../dist/dbcore-course.zip dbcore-course

toybox: setup ## train the toy base anew (hours on a CPU)
	$(BIN)/python -m dbcore.toybox
