# The README's commands. `make setup` needs Python 3.11 to 3.13; everything else runs in the .venv that it makes.
PYTHON ?= python3
BIN := .venv/bin
CUDA_ENV := .venv-cuda
# Tests of one file stay in one process, for they share what is slow to make, and files in their order, for the longest of
# them holds few tests and would else come last, alone.
PYTEST := -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

.PHONY: setup quickstart test test-faults test-cuda-build lint clean

setup: .venv/.complete

.venv/.complete: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt torch "scikit-build-core>=0.11" ninja
	$(BIN)/pip install --quiet --no-build-isolation --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -c "import pdmd_kernels"  # warns where the build failed, which pip does not tell
	touch $@

quickstart: setup
	PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/pretrain_phased_dmd.sh
	$(BIN)/python -m megatron_pdmd.evaluation.run_report runs/quickstart

test: setup
	$(BIN)/python $(PYTEST)

# Thousands of spoilt inputs and fifty killed runs, others every time; the suite has a few of each. docs/faults.md says what
# was found.
test-faults: setup
	$(BIN)/python $(PYTEST) tests/faults --hypothesis-profile thorough
	$(BIN)/python tests/faults/kill_runs.py --kills 50 --seed $$(date +%s)

# The same suite on the CUDA build of torch, with the kernels compiled by the nvcc that pip installs. No GPU is needed; 6 GB
# of disk are, and Linux. docs/gpu.md says what this shows and what it does not.
test-cuda-build: $(CUDA_ENV)/.complete
	toolkit=$$(echo $(CURDIR)/$(CUDA_ENV)/lib/python3*/site-packages/nvidia/cu13) && \
	CUDACXX=$$toolkit/bin/nvcc LIBRARY_PATH=$$toolkit/lib \
	$(CUDA_ENV)/bin/pip install --quiet --no-build-isolation --constraint constraints.txt --editable ".[dev]"
	$(CUDA_ENV)/bin/python tools/check_cuda_build.py
	$(CUDA_ENV)/bin/python $(PYTEST)

$(CUDA_ENV)/.complete: constraints.txt
	$(PYTHON) -m venv $(CUDA_ENV)
	$(CUDA_ENV)/bin/pip install --quiet --constraint constraints.txt \
		torch "cuda-toolkit[nvcc]" "scikit-build-core>=0.11" ninja
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv $(CUDA_ENV) build dist runs
