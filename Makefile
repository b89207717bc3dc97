.PHONY: format lint type test test-slow docs gpu

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

test-slow:
	python -m pytest -q -n 2 --dist loadscope -m 'slow and not gpu and not weights'

docs:
	python -m pytest -q -m docs tests/documentation
	python -m sphinx -q -W --keep-going -n -b html docs docs/_build

gpu:
	python benchmarks/gpu.py
