# Every command runs in the virtual environment .venv, which the first one makes.
# `make book PYTHON=python3.12` chooses the Python, `make book UNPINNED=1` the newest packages,
# `make book VENV=$CONDA_PREFIX` an environment that you keep yourself.
PYTHON ?= python3
VENV ?= .venv
PORT ?= 8000
RUN := $(VENV)/bin/python

.DEFAULT_GOAL := help
.PHONY: help book serve test lint notebooks colab bench repository clean environment

help: ## List these commands
	@echo "The geometry of depth: a course in Jupyter Book and the PyTorch library geomlib"
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

book: environment ## Build the site into _build/html from the stored outputs
	@$(RUN) tools/website.py

serve: book ## Build the site and serve it on this machine alone (PORT=8000)
	@echo "Serving http://127.0.0.1:$(PORT)/ until you press Ctrl-C"
	@$(RUN) -m http.server --bind 127.0.0.1 --directory _build/html $(PORT)

test: environment ## Run every test, the chapters and the built site included
	@$(RUN) tools/test.py

lint: environment ## Check style and types only
	@$(RUN) tools/test.py lint

notebooks: environment ## Run the chapters whose text has changed and store their outputs
	@$(RUN) tools/notebooks.py $(CHAPTER)

colab: environment ## Write self-contained notebooks for Colab or Kaggle into dist/colab
	@$(RUN) tools/colab.py

bench: PEERS = --peers
bench: environment ## Measure ours beside the peers, into benchmarks/results
	@set -e; for script in $$(grep -l '^if __name__' benchmarks/*.py); do echo "$$script"; $(RUN) "$$script"; done

repository: environment ## Write another repository address everywhere (URL=https://...)
	@$(RUN) tools/repository.py "$(URL)"

clean: ## Remove what was built; the virtual environment and the stored outputs stay
	rm -rf _build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

environment:
	@command -v $(PYTHON) >/dev/null || { \
	  echo "No $(PYTHON) was found: install Python 3.11 or newer and run the command again." >&2; exit 1; }
	@$(PYTHON) tools/bootstrap.py $(VENV) $(PEERS) $(if $(UNPINNED),--unpinned)
