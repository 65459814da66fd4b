# Every target makes .venv first, from requirements.txt, unless it is there and up to date.
PYTHON ?= python3
PYTHON_PEERS ?= python3.11
VENV := .venv/bin
RUN := runs/quickstart

.PHONY: quickstart test soak benchmark benchmark-peers lint results

quickstart: .venv/installed
	$(VENV)/python train.py --config=configs/quickstart.py --workdir=$(RUN)
	$(VENV)/python evaluate.py $(RUN)

test: .venv/installed
	$(VENV)/python -m pytest -n 2

# Long fault loops: ten runs killed at random moments.
soak: .venv/installed
	$(VENV)/python -m pytest -m soak tests/training_test.py

benchmark: .venv/installed
	$(VENV)/python -m benchmarks.step

# The same update in SAELens and dictionary_learning, in an environment of their own.
benchmark-peers: .venv-peers/installed
	.venv-peers/bin/python benchmarks/peers.py

.venv-peers/installed:
	$(PYTHON_PEERS) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet torch==2.14.1 sae-lens==6.54.12 dictionary-learning==0.1.0
	touch $@

# The README's figures again, into results/*.json; for the peers', python -m benchmarks.results peers.
results: .venv/installed
	$(VENV)/python -m benchmarks.results

lint: .venv/installed
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .

.venv/installed: requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "Python 3.12 or newer is needed; name one with make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(VENV)/pip install --quiet --disable-pip-version-check --no-deps --editable .
	touch $@
