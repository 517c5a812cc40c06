# Every target sets up what it needs by itself (.venv, pinned packages); later runs work offline. See .ci/tasks.
.DEFAULT_GOAL := help
.PHONY: help setup build demo test bench wheel gpu-check lint format clean

help:
	@echo "make demo       train a digits classifier with AdaHessian, AdamW and SGD, in C++ and in Python"
	@echo "make test       build everything (CUDA where nvcc is found), run ctest and pytest"
	@echo "make bench      run the benchmarks, write docs/benchmarks.md"
	@echo "make wheel      build dist/*.whl"
	@echo "make gpu-check  on a machine with a GPU: build, CUDA tests, compute-sanitizer, CUDA benchmark"
	@echo "make lint       formatting, clang-tidy, ruff, mypy;  make format rewrites the files"
	@echo "make build      only build (in build/);  make clean removes what was built"

setup build demo test bench wheel gpu-check lint format clean:
	@bash .ci/tasks $@
