# Two commands: `make demo` and `make test`. They make what they need in .venv, .cache, build and install, once.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.ONESHELL:
.PHONY: help demo test lint native bench clean setup-demo setup-test
PYTHON ?= python3
ENV := . tools/env.sh

help:  ## show this
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## /  make \1\t/' | expand -t 16

demo: setup-demo  ## export SmolLM2-135M, start the node, and stream a chat answer over ROS 2 (PROMPT="...")
	@$(ENV)
	bundle=$$(python tools/export_smollm2.py)
	python tools/demo.py --bundle "$$bundle" $(if $(PROMPT),--prompt "$(PROMPT)")

test: lint  ## set up everything and run all checks and tests (PYTEST_ARGS="-k name")
	@$(ENV)
	python tools/build_native.py --check
	export EDGELLM_REQUIRE_ROS=1
ifdef PYTEST_ARGS
	python -m pytest $(PYTEST_ARGS)
else
	# Two processes; a file's tests stay together, for they share fixtures. By name, so that the long pipeline starts early.
	python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not alone"
	python -m pytest -m alone test/native test/gpu
endif

lint: setup-test  ## ruff, mypy, import-linter, clang-format, hadolint
	@$(ENV)
	echo "-- ruff"; ruff check .
	echo "-- mypy"; mypy
	echo "-- import-linter"; lint-imports
	files=$$(git ls-files -- 'native/*.cpp' 'native/*.hpp' 'native/*.cu' 'native/*.cuh')
	if [ -n "$$files" ]; then echo "-- clang-format"; clang-format --dry-run -Werror $$files; fi
	if command -v hadolint >/dev/null; then echo "-- hadolint"; hadolint docker/Dockerfile.*; fi

native: setup-demo  ## compile the CUDA module for the GPU here, or for EDGELLM_CUDA_ARCHS="87 90a"
	@$(ENV)
	python tools/build_native.py

bench: setup-test  ## measure against llama.cpp and print the README's tables
	@$(ENV)
	python -c "import llama_cpp" 2>/dev/null || { echo "-- building llama-cpp-python, the peer (some minutes)"; pip install -q "llama-cpp-python>=0.3"; }
	bundle=$$(python tools/export_smollm2.py)
	gguf=$$(python tools/export_smollm2.py --gguf)
	python bench/compare_llama_cpp.py --bundle "$$bundle" --gguf "$$gguf"
	python bench/bench_node.py --bundle "$$bundle"

clean:  ## remove everything that was made, .venv and .cache too
	rm -rf .venv .cache build install log dist *.egg-info edgellm_ros/_native*.so .pytest_cache .mypy_cache .ruff_cache .import_linter_cache

setup-demo:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) was not found; install Python 3.10 to 3.13 (newer where ROS 2 is sourced)" >&2; exit 1; }
	$(PYTHON) tools/setup_env.py demo

setup-test:
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) was not found; install Python 3.10 to 3.13 (newer where ROS 2 is sourced)" >&2; exit 1; }
	$(PYTHON) tools/setup_env.py test
