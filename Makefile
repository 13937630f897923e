PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

.PHONY: demo test lint docs dist families oldest clean

demo: $(STAMP)
	$(BIN)/tokendrop demo --out runs/demo

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not gpu"

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/ty check
	$(BIN)/mypy --strict --python-executable $(BIN)/python tests/typed
	$(BIN)/basedpyright --level error tests/typed

# A site of all pages, in site/.
docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The source distribution and the wheel made of it, in dist/, as an index takes them and as they are imported away from here.
dist: $(STAMP)
	rm -rf dist .venv-dist
	$(BIN)/python -m venv .venv-dist
	.venv-dist/bin/python -m pip install --quiet -c constraints.txt build twine
	.venv-dist/bin/python -m build --outdir dist
	.venv-dist/bin/python -m twine check --strict dist/*
	.venv-dist/bin/python -m pip install --quiet --no-deps --target .venv-dist/away dist/*.whl
	cd .venv-dist/away && PYTHONPATH=. $(abspath $(BIN)/python) $(CURDIR)/tests/wheel.py

# The table in docs/families.md, from the results of its tests; most of an hour on two cores.
families: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not gpu" --families-table tests/engine

# The engine's core on the oldest versions that pyproject.toml allows; downloads several GB.
oldest:
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install --quiet -c constraints-oldest.txt -e . pytest pytest-xdist hypothesis
	.venv-oldest/bin/python -m pytest -W default -n 2 --dist loadfile tests/engine/test_equivalence.py \
	  tests/engine/model/test_families.py tests/engine/test_inject.py tests/engine/plan/test_plan.py tests/kernels tests/methods

# torch first: later requirements are then met by it, and no other build of it is looked for.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "tokendrop needs Python 3.11 or later; set PYTHON=")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[demo,test,docs]'
	touch $@

clean:
	rm -rf .venv .venv-oldest .venv-dist dist site runs
