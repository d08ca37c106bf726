# make quickstart   text to a trained MeSH model, with pictures
# make test         the test suite (make test-all: every pair of parallel settings as well)
# make lint         ruff and mypy;  make bench  step times of the schemes
# make test-hf4     what exports do with transformers 4.57 instead of 5
# make test-slurm   jobs on a real SLURM that the tests start (as root; make slurm-env installs Debian's packages)
#
# Every target sets up .venv by itself. Override to choose the interpreter, the torch build or the index:
#   make quickstart PYTHON=python3.12 TORCH='torch==2.13.0+cpu' PIP_ARGS='--index-url ...'

find_python = for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' 2>/dev/null && echo $$p && break; done
PYTHON ?= $(shell $(find_python))
TORCH ?= torch==2.13.0
PIP_ARGS ?=
VENV ?= .venv
PYTEST_ARGS ?=
# Processes that run tests; some tests start four more each, so three are too many for two cores.
WORKERS ?= 2

python := $(VENV)/bin/python
installed := $(VENV)/.installed

.PHONY: install quickstart test test-all test-hf4 slurm-env test-slurm lint bench configs clean

install: $(installed)

$(installed): setup.py .ci/constraints.txt
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or 3.12 is needed; make PYTHON=/path/to/python3.11" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(python) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c .ci/constraints.txt '$(TORCH)'
	$(python) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) -c .ci/constraints.txt -e '.[data,hf,eval,dev]'
	@touch $@

quickstart: $(installed)
	$(python) examples/quickstart/run.py

test: $(installed)
	OMP_NUM_THREADS=1 $(python) -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

test-all: $(installed)
	MESH_TEST_ALL=1 OMP_NUM_THREADS=1 $(python) -m pytest -n $(WORKERS) --dist loadgroup $(PYTEST_ARGS)

hf4 := $(VENV)-hf4

test-hf4: $(hf4)/.installed
	PYTHONPATH=$(CURDIR)/$(hf4) OMP_NUM_THREADS=1 $(python) -m pytest -n 2 --dist loadgroup tests/unit/hf $(PYTEST_ARGS)

$(hf4)/.installed: $(installed)
	$(python) -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) --no-deps --upgrade --target $(hf4) \
		transformers==4.57.6 tokenizers==0.22.2 huggingface_hub==0.36.2
	@touch $@

slurm-env:
	PATH="$$PATH:/usr/sbin"; command -v slurmctld slurmd munged >/dev/null || { apt-get update -q && apt-get install -qy --no-install-recommends slurmctld slurmd slurm-client munge; }

test-slurm: $(installed)
	MESH_TEST_SLURM=1 OMP_NUM_THREADS=1 $(python) -m pytest tests/slurm $(PYTEST_ARGS)

lint: $(installed)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(installed)
	$(python) tools/benchmark.py

configs: $(installed)
	$(python) -m megatron_mesh.config.presets examples/configs
	$(python) -m megatron_mesh.config.cluster_presets examples/slurm/6.9b

clean:
	rm -rf $(VENV) runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
