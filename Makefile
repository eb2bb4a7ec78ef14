# The commands of the project; `make help` lists them. scripts/setup provides what each of them needs.

# What runs on a GPU runs with: .venv's Python, or another one that has PyTorch for CUDA, pytest, hypothesis and
# apache-tvm-ffi, as GPU_PYTHON=python3. That one is looked for where the caller would find it.
CALLERS_PATH := $(PATH)
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export HF_HUB_OFFLINE ?= 1
MAKEFLAGS += --no-print-directory

PIP_INSTALL := python -m pip install --quiet --disable-pip-version-check
LIBRARY := python/mate/_lib/libmate_python.so
ON_GPU = PYTHONPATH=python$(if $(PYTHONPATH),:$(PYTHONPATH)) $(if $(GPU_PYTHON),PATH="$(CALLERS_PATH)" $(GPU_PYTHON),python)
CXX_FILES = git ls-files --cached --others --exclude-standard -- '*.h' '*.cpp'

.PHONY: help demo demo-gpu test cpp-test python-test test-gpu sanitize-gpu gpu-setup build bench-cpu bench-gpu bench-compile install
.PHONY: wheel lint format clean

help: ## List the commands
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 22

demo: ## A language model writes text with all its attention done by MATE
	@scripts/setup demo
	@$(MAKE) install
	python examples/generate.py

demo-gpu: $(LIBRARY) ## The same on an NVIDIA GPU (GPU_PYTHON=python3 uses that Python and its PyTorch, not .venv)
	@$(if $(GPU_PYTHON),,scripts/setup demo)
	$(ON_GPU) examples/generate.py --device cuda

test: ## Every test: C++ under sanitizers and in release, then Python
	@$(MAKE) cpp-test
	@$(MAKE) python-test

cpp-test: ## The C++ tests, under AddressSanitizer and UndefinedBehaviorSanitizer, and in release
	@scripts/setup test
	@$(MAKE) build-sanitize build-release
	ctest --preset sanitize
	ctest --preset release

python-test: ## The Python tests, on the installed packages
	@scripts/setup test
	@$(MAKE) install
	pytest -q

test-gpu: gpu-setup $(LIBRARY) ## The tests on an NVIDIA GPU (GPU_PYTHON as for demo-gpu)
	MATE_TEST_DEVICE=cuda $(ON_GPU) -m pytest -q

sanitize-gpu: gpu-setup $(LIBRARY) ## compute-sanitizer's four tools over small calls on an NVIDIA GPU (likewise)
	$(ON_GPU) tests/python/sanitize_gpu.py

gpu-setup:
	@$(if $(GPU_PYTHON),,scripts/setup test)

$(LIBRARY): CMakeLists.txt $(shell find cmake include src -type f)
	@$(MAKE) build
	@touch $@

build: ## The release build, with the Python binding in python/mate/_lib (use it with PYTHONPATH=python)
	@scripts/setup test
	@$(MAKE) build-release

build-%:
	@echo "Building the preset $*"
	@scripts/quietly cmake --preset $*
	@scripts/quietly cmake --build --preset $*

bench-cpu: ## MATE beside PyTorch on this CPU: tables, all numbers in build/bench-cpu.json, pictures in docs/images
	@$(MAKE) build
	@scripts/setup bench
	PYTHONPATH=python python benchmarks/cpu.py --json build/bench-cpu.json --pictures docs/images

bench-gpu: $(LIBRARY) ## MATE beside cuDNN, and FlashAttention-3 where FA3_LIBRARY names it, on an NVIDIA GPU (GPU_PYTHON as for demo-gpu)
	@$(if $(GPU_PYTHON),,scripts/setup bench)
	$(ON_GPU) benchmarks/gpu.py --json build/bench-gpu.json --pictures docs/images

bench-compile: ## Seconds, bytes and registers of GPU kernels; needs no GPU
	@scripts/setup test
	@scripts/quietly cmake --preset release -DMATE_BUILD_BENCHMARKS=ON
	@scripts/quietly cmake --build --preset release
	MATE_NVRTC=$$(python -c 'import nvidia.cu13 as cuda; print(cuda.__path__[0])')/lib/libnvrtc.so.13 build/release/compile

install: ## Both Python distributions into .venv
	@scripts/setup demo
	@echo "Installing mate-attention and flash-attn-3 into .venv"
	@$(PIP_INSTALL) --no-build-isolation --no-deps --force-reinstall . python/flash-attn-3

wheel: ## Wheels of both distributions, in dist/
	@scripts/setup demo
	python -m pip wheel --quiet --no-deps --wheel-dir dist . python/flash-attn-3

lint: ## Check formatting, style and types
	@scripts/setup lint
	$(CXX_FILES) | xargs clang-format --dry-run -Werror
	ruff check --quiet
	ruff format --check --quiet
	mypy

format: ## Bring all sources into the project's format
	@scripts/setup lint
	$(CXX_FILES) | xargs clang-format -i
	ruff check --quiet --fix
	ruff format --quiet

clean: ## Remove what was built; .venv stays
	rm -rf build dist python/mate/_lib python/flash-attn-3/build python/flash-attn-3/*.egg-info
