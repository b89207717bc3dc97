.PHONY: format lint type test gpu

format:
	ruff format .
	ruff check --fix .

lint:
	ruff format --check .
	ruff check .

type:
	mypy

test: lint type
	python -m pytest -q -n 2

gpu:
	python benchmarks/gpu.py
