# Every target first creates .venv with the versions of requirements.txt, unless it is up to date.
PYTHON ?= python3
PYTHON_PEERS ?= python3.11
VENV := .venv/bin
RUN := runs/quickstart
PEERS := .peers

.PHONY: quickstart test test-peers test-pages soak benchmark benchmark-peers lint lock wheel results docs tutorials

quickstart: .venv/installed
	$(VENV)/gemma-scope train quickstart $(RUN)
	$(VENV)/gemma-scope evaluate $(RUN) --fast

test: .venv/installed .venv/libtpu
	$(VENV)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --max-worker-restart 0

# Compares with other tools, in a separate environment: transformers computes reference values for small Gemma models and
# the real 270M. SAELens, dictionary_learning, circuit-tracer and SAEBench read our files, and write files for us to read.
test-peers: .venv/installed .venv-peers/installed
	$(VENV)/python tests/interop.py $(PEERS)/interop
	.venv-peers/bin/python tests/peers/interop.py $(PEERS)/interop
	.venv-peers/bin/python tests/peers/hugging_face.py $(PEERS) \
	  "$$($(VENV)/python -c 'from gemma_scope_jax.models import registry; print(registry.weights_path("gemma3_270m", ""))' | tail -1)"
	$(VENV)/python tests/peers_evaluation.py $(PEERS)/evaluation
	.venv-peers/bin/python tests/peers/evaluation.py $(PEERS)
	.venv-peers/bin/python tests/peers/bench.py $(PEERS)
	PEERS_FOLDER=$(abspath $(PEERS)) $(VENV)/python -m pytest -m 'not soak' tests/models/parity_test.py tests/saes/interop_test.py \
	  tests/evaluation/peers_evaluation_test.py

# Tests pages in a real browser (Debian's package chromium).
test-pages: .venv/installed
	@command -v chromium >/dev/null || { echo "chromium is needed: apt-get install chromium"; exit 1; }
	$(VENV)/python -m pytest tests/evaluation/page_test.py

# Long fault-injection loops: ten runs killed at random moments; four processes of which one is preempted or killed; and
# each attack of tests/attacks.py COUNT times. SEED repeats the attacks of an earlier call.
COUNT := 50
soak: .venv/installed
	$(VENV)/python -m pytest -m soak tests/training/loop_test.py tests/runtime/distributed_test.py
	$(VENV)/python tests/attacks.py all --count=$(COUNT) $(if $(SEED),--seed=$(SEED))

benchmark: .venv/installed
	$(VENV)/python -m benchmarks.step

# Times the same update in SAELens and dictionary_learning, in a separate environment.
benchmark-peers: .venv-peers/installed
	.venv-peers/bin/python benchmarks/peers.py

.venv-peers/installed:
	$(PYTHON_PEERS) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 gguf==0.19.0 sae-lens==6.54.12 \
	  dictionary-learning==0.1.0 tabulate==0.9.0
	.venv-peers/bin/pip install --quiet --no-deps circuit-tracer==0.5.0 sae-bench==0.6.0  # No server, no judge.
	touch $@

# Measures the README's numbers into results/*.json; for those of other tools, run python -m benchmarks.results peers.
results: .venv/installed
	$(VENV)/python -m benchmarks.results

# The TPU compiler. It is not installed as a package, because JAX would then look for a TPU at every start.
.venv/libtpu: .venv/installed
	$(VENV)/uv pip install --quiet --no-deps --target $@ libtpu==0.0.52
	touch $@

# The documentation site, in build/docs; it opens from disk. Warnings, such as broken links, are errors.
docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 $(VENV)/mkdocs build --quiet

# The tutorials' notebooks, executed again; they use what `make quickstart` trained.
tutorials: .venv/installed
	$(VENV)/python -m benchmarks.notebooks

# mypy checks the modules without type errors; pyproject.toml lists those that still have some.
lint: .venv/installed
	$(VENV)/ruff format --check .
	$(VENV)/ruff check .
	$(VENV)/lint-imports --no-logo --no-cache
	$(VENV)/mypy

# Rewrites requirements.txt from the ranges of pyproject.toml, keeping its versions where the ranges allow.
# `make lock UPGRADE=--upgrade` takes newer versions of all packages, `make lock UPGRADE='--upgrade-package NAME'` of one.
UPGRADE :=
lock: .venv/uv
	$(VENV)/uv pip compile --quiet pyproject.toml --group dev --extra quickstart --extra analysis --universal \
	  --python-version 3.12 --output-file requirements.txt $(UPGRADE)

# Builds the wheel, installs it into empty environments and trains, with the lowest and with the newest versions.
wheel: .venv/installed
	.ci/wheel

.venv/installed: .venv/uv requirements.txt pyproject.toml setup.py
	$(VENV)/uv pip install --quiet --python $(VENV)/python -r requirements.txt
	$(VENV)/uv pip install --quiet --python $(VENV)/python --no-deps --editable .
	touch $@

.venv/uv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || \
	  { echo "Python 3.12 or newer is needed; name one with make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv .venv
	$(VENV)/pip install --quiet --disable-pip-version-check uv==0.13.9  # uv resolves in seconds, pip in minutes.
	touch $@
