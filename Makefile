# Set-up, the main job, the tests. Everything lives in VENV; `make clean` removes it.
VENV ?= .venv
PYTHON ?= python3
# Another index for torch, for who needs another build of it: make TORCH_INDEX=https://... demo
TORCH_INDEX ?=
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
TORCH = torch==2.13.0
WHEEL_PYTHONS ?= python3.11 python3.12 python3.13
CONSTRAINTS = $(VENV)/constraints.txt
OLDEST_TOOLS = hypothesis pytest pytest-benchmark pytest-timeout
# what speaks to torch, Lightning, numpy and scipy
OLDEST_TESTS = tests/autolrs tests/switchml tests/collectives tests/trainkit/integrations tests/kernels/test_attention.py
SOURCES = pyproject.toml constraints.txt $(shell find CMakeLists.txt autolrs switchml collectives kernels p4 docs trainkit/ \
	-name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.p4' -o -name '*.bpf.c' -o -name '*.md' -o -name 'CMakeLists.txt')

.PHONY: demo test test-slow test-gpu test-oldest lint setup wheels clean

demo: $(VENV)/installed
	$(VENV)/bin/trainkit demo --out runs/demo --overwrite

test: $(VENV)/installed-for-tests
	$(VENV)/bin/python -m pytest $(PYTEST)

test-slow: $(VENV)/installed-for-tests
	$(VENV)/bin/python -m pytest --slow -m slow $(PYTEST)

# In parts that compile their kernels in less than nine minutes on 16 cores, nothing cached.
GPU_TESTS = $(VENV)/bin/python -m pytest --numprocesses=logical --dist=worksteal
test-gpu: $(VENV)/installed-for-tests
	$(GPU_TESTS) tests/kernels/test_gpu.py
	$(GPU_TESTS) tests/kernels/test_gpu_launch.py tests/kernels/test_attention.py tests/kernels/test_attention_hooks.py \
		tests/kernels/test_attention_ops.py tests/kernels/test_bits.py tests/kernels/test_fused.py

# The lowest versions that pyproject.toml allows, in an environment of their own.
test-oldest: $(VENV)-oldest/installed
	$(VENV)-oldest/bin/python -m pytest $(if $(PYTEST),$(PYTEST),$(OLDEST_TESTS))

lint: $(VENV)/installed-for-tests
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy && $(VENV)/bin/lint-imports
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --strict

setup: $(VENV)/installed-for-tests

# One wheel for each Python, and the source distribution, in dist/.
wheels: $(VENV)/python
	@for python in $(WHEEL_PYTHONS); do echo "$$python" && $$python -m pip --disable-pip-version-check wheel --quiet --no-deps --wheel-dir dist . || exit 1; done
	$(PIP) install build && $(VENV)/bin/python -m build --sdist --outdir dist .

$(VENV)/python: constraints.txt
	@sh .ci/prerequisites $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	@# a CUDA build of torch brings the one Triton that it works with, a CPU build none
	$(PIP) show triton >/dev/null 2>&1 && grep -v '^triton==' constraints.txt > $(CONSTRAINTS) || cp constraints.txt $(CONSTRAINTS)
	touch $@

$(VENV)/installed: $(VENV)/python $(SOURCES)
	$(PIP) install --constraint $(CONSTRAINTS) .
	touch $@

$(VENV)/installed-for-tests: $(VENV)/python $(SOURCES)
	$(PIP) install --constraint $(CONSTRAINTS) '.[test,p4,kernels,docs]'
	touch $@ $(VENV)/installed

$(VENV)-oldest/installed: .ci/oldest $(SOURCES)
	@sh .ci/prerequisites $(PYTHON)
	$(PYTHON) -m venv $(VENV)-oldest
	$(PYTHON) .ci/oldest pyproject.toml > $(VENV)-oldest/constraints.txt
	$(VENV)-oldest/bin/python -m pip --disable-pip-version-check --quiet install \
		--constraint $(VENV)-oldest/constraints.txt . $(OLDEST_TOOLS)
	touch $@

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist
