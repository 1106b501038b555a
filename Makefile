# Each target sets up what it needs in .venv. PYTHON picks the interpreter (3.10 to 3.13).
PYTHON ?= python3
ROOT ?= runs/quickstart
BIN := .venv/bin

.PHONY: install install-dev quickstart serve submit test test-slow test-lowest lint docs wheel release bench clean

install: .venv/.installed
install-dev: .venv/.installed-dev

quickstart: .venv/.installed  ## the whole pipeline on real multilingual text, minutes on two cores
	$(BIN)/python -m f2llm_ray run --recipe quickstart --root $(ROOT)

serve: .venv/.installed  ## the quickstart's model on http://127.0.0.1:8000
	set -a; . ./serve_configs/haproxy.env; $(BIN)/serve run serve_configs/quickstart.yaml

submit: .venv/.installed  ## a recipe on a running cluster: make submit ADDRESS=http://HEAD:8265 RECIPE=... ROOT=URI
	RAY_AUTH_MODE=token $(BIN)/python cluster/submit.py --address $(ADDRESS) --recipe $(RECIPE) --root $(ROOT)

test: .venv/.installed-dev  ## all tests, without a GPU
	$(BIN)/python -m pytest

test-slow: .venv/.installed-dev  ## the tests that take minutes each
	$(BIN)/python -m pytest -m slow

test-lowest: .venv/bin/python  ## all tests on the lowest versions of what the package depends on, in a venv of its own
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python build/lowest
	$(BIN)/uv pip install --quiet --python build/lowest/bin/python --resolution lowest-direct --editable '.[all]'
	$(BIN)/uv pip install --quiet --python build/lowest/bin/python --editable '.[all,dev]'
	build/lowest/bin/python -m pytest

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports --no-logo
	$(BIN)/mypy

docs: .venv/.installed-dev  ## the documentation as a site in build/docs
	$(BIN)/mkdocs build --quiet

wheel: .venv/bin/python  ## the wheel in dist/, installed alone and tried; with TAG=v1.2.3, its version must be 1.2.3
	rm -rf dist build/wheel
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .
	$(BIN)/python -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --constraint constraints.txt dist/*.whl
	cd build && wheel/bin/f2llm --help > wheel/help.txt
	cd build && wheel/bin/python -c 'import pathlib, f2llm_ray; \
		place = pathlib.Path(f2llm_ray.__file__).parent; assert (place / "py.typed").is_file(); \
		assert "$(TAG)" in ("", "v" + f2llm_ray.__version__), f"the tag $(TAG) is not v{f2llm_ray.__version__}"'

release:  ## the wheel in dist/ as a release on GitHub: make release TAG=v1.2.3
	gh release create $(TAG) dist/*.whl --verify-tag --title $(TAG) --notes-file CHANGELOG.md

bench: .venv/.installed-bench  ## ours beside its peers; each prints one JSON object as its last line
	$(BIN)/python -m benchmarks.encode
	$(BIN)/python -m benchmarks.embed
	$(BIN)/python -m benchmarks.train
	$(BIN)/python -m benchmarks.loader
	$(BIN)/python -m benchmarks.mining
	$(BIN)/python -m benchmarks.serve
	$(BIN)/python -m benchmarks.dedup

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache

.venv/bin/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | .venv/bin/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	touch $@

.venv/.installed-dev: pyproject.toml constraints.txt .venv/.installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev]'
	touch $@

.venv/.installed-bench: pyproject.toml constraints.txt .venv/.installed-dev
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all,dev,bench]'
	touch $@
