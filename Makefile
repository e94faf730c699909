# Set-up, the main job, the tests. Everything lives in VENV; `make clean` removes it.
VENV ?= .venv
PYTHON ?= python3
# Another index for torch, for who needs another build of it: make TORCH_INDEX=https://... demo
TORCH_INDEX ?=
PIP = $(VENV)/bin/python -m pip --disable-pip-version-check --quiet
TORCH = torch==2.13.0
SOURCES = pyproject.toml constraints.txt $(shell find CMakeLists.txt autolrs switchml collectives kernels p4 trainkit/ \
	-name '*.py' -o -name '*.cpp' -o -name '*.h' -o -name '*.hpp' -o -name '*.p4' -o -name '*.bpf.c' -o -name 'CMakeLists.txt')

.PHONY: demo test test-gpu lint setup clean

demo: $(VENV)/installed
	$(VENV)/bin/trainkit demo --out runs/demo --overwrite

test: $(VENV)/installed-for-tests
	$(VENV)/bin/python -m pytest $(PYTEST)

# In parts that compile their kernels in less than nine minutes on 16 cores, nothing cached.
GPU_TESTS = $(VENV)/bin/python -m pytest --numprocesses=logical --dist=worksteal
test-gpu: $(VENV)/installed-for-tests
	$(GPU_TESTS) tests/kernels/test_gpu.py
	$(GPU_TESTS) tests/kernels/test_gpu_launch.py tests/kernels/test_attention.py tests/kernels/test_attention_hooks.py \
		tests/kernels/test_attention_ops.py tests/kernels/test_bits.py tests/kernels/test_fused.py

lint: $(VENV)/installed-for-tests
	$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check . && $(VENV)/bin/mypy && $(VENV)/bin/lint-imports

setup: $(VENV)/installed-for-tests

$(VENV)/python: constraints.txt
	@sh .ci/prerequisites $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) $(TORCH)
	touch $@

$(VENV)/installed: $(VENV)/python $(SOURCES)
	$(PIP) install --constraint constraints.txt .
	touch $@

$(VENV)/installed-for-tests: $(VENV)/python $(SOURCES)
	$(PIP) install --constraint constraints.txt '.[test,p4,kernels]'
	touch $@ $(VENV)/installed

clean:
	rm -rf $(VENV) build dist
