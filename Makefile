# Two commands do everything: `make demo` and `make test`. Both create .venv and install locked versions first.
PYTHON ?= python3
# One environment for each Python: .venv for the default, .venv-3.13 for `make PYTHON=python3.13`.
ifndef VENV
VENV := .venv$(if $(filter-out python3,$(PYTHON)),-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])'))
endif
OUT ?= demo
DATA ?=
TORCH ?= yes
# One more than the 2 cores of CI: tests that start processes or servers wait for them.
WORKERS ?= 3
export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test test-short test-slow test-backbones golden fuzz faults lint lock image suite clean help

help:
	@echo "make demo [DATA=folder] [OUT=folder]  exams -> shards -> pretraining -> weights -> scores -> report.html"
	@echo "make test [TORCH=no]                  the test suite; TORCH=no leaves PyTorch out and compares with frozen references"
	@echo "make test-short                       without the tests that take ten seconds or more"
	@echo "make test-slow                        the tests that take minutes (the full demo among them)"
	@echo "make test-backbones                   backbones of transformers, timm and open_clip, and adapters for peft, in an environment of their own (Python 3.11)"
	@echo "make fuzz                             10,000 damaged and malicious files through the ingest, 20,000 through the other readers"
	@echo "make faults                           kills, full disks and damage on runs of the command, and what becomes of them"
	@echo "make suite [OUT=folder]               scores the demo's encoder on the phantom of the 19 tasks, then with shuffled labels"
	@echo "make golden                           plan the named runs with the TPU compiler and compare with tests/golden (minutes)"
	@echo "make lint                             ruff and pyright"
	@echo "make lock                             renew requirements/*.txt from setup.py"
	@echo "make image IMAGE=name [VARIANT=tpu]   the container image of this commit: tpu, cuda, cpu or beam; pushes it and prints its digest"
	@echo "make clean                            remove the environments and demo/"
	@echo "PYTHON=python3.13 runs any of them with that Python, in .venv-3.13. Locked are both ends of what is supported:"
	@echo "Python 3.11 with jax 0.10 and Python 3.13 with jax 0.12."

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if v >= (3, 11) else f"error: $(PYTHON) is Python {v[0]}.{v[1]}, but 3.11 or newer is needed; name one with make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-installed: requirements/demo.txt setup.py | $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet --requirement requirements/demo.txt
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.test-installed: requirements/test.txt setup.py | $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet --requirement requirements/test.txt
	$(VENV)/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

$(VENV)/.torch-installed: requirements/torch.txt $(VENV)/.test-installed
	$(VENV)/bin/pip install --quiet --requirement requirements/torch.txt --constraint requirements/test.txt
	@touch $@

$(VENV)-backbones/.installed: requirements/backbones.txt requirements/torch.txt requirements/test.txt setup.py
	$(PYTHON) -m venv $(VENV)-backbones
	$(VENV)-backbones/bin/pip install --quiet --requirement requirements/test.txt
	$(VENV)-backbones/bin/pip install --quiet --requirement requirements/torch.txt --constraint requirements/test.txt
	$(VENV)-backbones/bin/pip install --quiet --no-deps --requirement requirements/backbones.txt
	$(VENV)-backbones/bin/pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

test-backbones: $(VENV)-backbones/.installed
	$(VENV)-backbones/bin/python -m pytest --numprocesses=0 tests/evaluate/test_torch_backbones.py tests/convert/test_adapter.py tests/convert/test_classifiers.py

demo: $(VENV)/.demo-installed
	$(VENV)/bin/python -m curia_jax.demo --output='$(OUT)' $(if $(DATA),--data='$(DATA)')

TEST_READY = $(VENV)/.test-installed $(if $(filter yes,$(TORCH)),$(VENV)/.torch-installed)

test: $(TEST_READY)
	$(VENV)/bin/python -m pytest --numprocesses=$(WORKERS) --dist=worksteal

test-short: $(TEST_READY)
	$(VENV)/bin/python -m pytest -m 'not slow and not long' --numprocesses=$(WORKERS) --dist=worksteal

test-slow: $(TEST_READY)
	$(VENV)/bin/python -m pytest -m slow --numprocesses=1

fuzz: $(VENV)/.test-installed
	$(VENV)/bin/python -m benchmarks.fuzz
	$(VENV)/bin/python -m benchmarks.fuzz_readers

faults: $(VENV)/.test-installed
	$(VENV)/bin/python -m benchmarks.faults

suite: $(VENV)/.test-installed
	$(VENV)/bin/python -m benchmarks.suite --backbone='$(OUT)/run' --output=runs/suite

golden: $(VENV)/.test-installed
	$(VENV)/bin/python -m pytest -m slow --numprocesses=0 tests/plan/test_golden.py

lint: $(VENV)/.test-installed
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(VENV)/bin/python

# --universal: one file serves Python 3.11 (jax 0.10) to 3.13 (jax 0.12) on Linux and macOS. PyTorch stays in a file of its own, because which
# build fits (CPU or CUDA) is the machine's matter. The demo has the versions that the suite was run with; it is not the other
# way round, because Apache Beam wants an older protobuf, pyarrow and pillow.
lock: $(VENV)/bin/python
	$(VENV)/bin/pip install --quiet uv
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --no-header --extra test --extra lint --extra plan setup.py -o requirements/test.txt
	$(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --no-header --extra demo -c requirements/test.txt setup.py -o requirements/demo.txt
	for variant in cpu:beam cuda:cuda tpu:tpu; do \
	  $(VENV)/bin/uv pip compile --quiet --universal --python-version 3.11 --no-header --no-annotate --extra ingest --extra cloud \
	    --extra evaluate --extra $${variant#*:} -c requirements/test.txt setup.py -o requirements/image-$${variant%:*}.txt; \
	done

VARIANT ?= tpu
REVISION = $(shell git describe --always --abbrev=12 --exclude='*' --dirty)

# Named after the commit; launched by the digest that is printed, so that every host has the same.
image:
	@test -n '$(IMAGE)' || { echo "error: name the image with IMAGE=REGION-docker.pkg.dev/PROJECT/REPOSITORY/curia-jax"; exit 2; }
	docker build $(if $(filter beam,$(VARIANT)),--target=beam --build-arg VARIANT=cpu,--build-arg VARIANT='$(VARIANT)') --build-arg REVISION='$(REVISION)' --tag '$(IMAGE):$(VARIANT)-$(REVISION)' .
	docker push '$(IMAGE):$(VARIANT)-$(REVISION)'
	docker inspect --format '{{index .RepoDigests 0}}' '$(IMAGE):$(VARIANT)-$(REVISION)'

clean:
	rm -rf .venv .venv-* demo
