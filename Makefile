.PHONY: format lint type test docs gpu

format:
	ruff format .
	ruff check --fix .

lint:
	ruff format --check .
	ruff check .

type:
	mypy

test: lint type
	python -m pytest -q -n 2 --dist loadscope

docs:
	python -m pytest -q -m docs tests/documentation
	python -m sphinx -q -W --keep-going -n -b html docs docs/_build

gpu:
	python benchmarks/gpu.py
