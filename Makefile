.PHONY: demo test test-gpu test-browser setup lab site figures
PYTHON ?= python3
BIN := .venv/bin

demo: setup  ## caption held-out scenes from disk with the embedded checkpoint
	$(BIN)/qvision demo --output figures/demo.png

test: setup  ## lint, tests, and every notebook
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

test-gpu: setup  ## what only a machine with a GPU can show
	QVISION_GPU_TESTS=1 $(BIN)/python -m pytest tests/gpu

test-browser: setup  ## the explorer and pages in Chromium (from Debian), and figures/explorer.png of it
	command -v chromium || { apt-get update && apt-get install -y --no-install-recommends chromium; }
	EXPLORER_SCREENSHOT=figures/explorer.png $(BIN)/python -m pytest tests/browser tests/test_page.py

setup: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --requirement requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

lab: setup  ## JupyterLab on the notebooks
	$(BIN)/jupyter lab notebooks

site: setup  ## every notebook with its outputs, as HTML in site/, at most 25 MB
	$(BIN)/jupyter nbconvert --execute --to html --output-dir site notebooks/*.ipynb
	test $$(du -sm site | cut -f1) -le 25

figures: demo  ## redraw every picture and table of the README and the results page
	$(BIN)/qvision curves --output figures/training.png
	$(BIN)/qvision look --output figures
	$(BIN)/qvision findings --figures figures
	$(BIN)/qvision tables README.md qvision_lab/benchmark/results/README.md --figures figures
