# make demo: create the environment, then the whole loop on the embedded model. make test: every notebook, and the command line.
PYTHON ?= python3
VENV = .venv
BIN = $(VENV)/bin

.PHONY: env demo test lint docs readme prepare audit-deps clean

env: $(VENV)/.ready

$(VENV)/.ready: settings.ini setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "selfalign needs Python 3.11 or newer: make PYTHON=python3.11 $(MAKECMDGOALS)")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	-test -e .git && $(BIN)/nbdev_install_hooks > /dev/null
	touch $@

demo: env
	$(BIN)/selfalign run quickstart

test: env
	OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1 TQDM_DISABLE=1 $(BIN)/python -m pytest -q -n 2 -p no:cacheprovider --durations=12 .ci

# errors, imports, likely bugs, over the package and the notebooks; the limits a page keeps; licences of the dependencies
lint: env
	$(BIN)/ruff check -q --config .ci/ruff.toml nbs selfalign .ci
	$(BIN)/python .ci/pages.py
	$(BIN)/python .ci/licences.py > /dev/null

docs: env
	$(BIN)/python .ci/docs.py

readme: env
	$(BIN)/python .ci/readme.py

# before a commit: export, run and store the pages, clean, README
prepare: env
	$(BIN)/nbdev_export
	$(BIN)/python .ci/execute.py
	$(BIN)/nbdev_clean
	$(BIN)/python .ci/readme.py

# known vulnerabilities of what is installed; needs the network
audit-deps: env
	$(BIN)/pip install -q pip-audit
	$(BIN)/pip-audit -s osv --skip-editable

clean:
	rm -rf _proc _proc_smalldocs _docs build dist *.egg-info
