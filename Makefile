# make sweep · make test · make check · make bench: each sets up what it needs.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: sweep test check bench format
.DELETE_ON_ERROR:

# torch first and by its pin: asked for by a range, pip would take a build with gigabytes of CUDA
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $@

sweep: .venv/.installed  ## the embedded phantom: which IoU interval makes a good positive pair?
	$(BIN)/medssl sweep iou-interval --pretrainings 2 --finetunings 2

# slow tests hold every core themselves, and share one Ray
test: .venv/.installed
	$(BIN)/python -m pytest -m "not slow" --numprocesses auto --dist loadfile
	$(BIN)/python -m pytest -m slow

# mypy does not follow an editable install whose package is the root itself: a link gives it the package's name
check: .venv/.installed
	mkdir -p .types && ln -sfn .. .types/medssl
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	MYPYPATH=.types $(BIN)/mypy -p medssl.methods -p medssl.platform -p medssl.search_spaces -m medssl.cli

bench: .venv/.installed
	$(BIN)/medssl bench

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
