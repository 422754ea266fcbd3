# The two commands of the README are `make demo` and `make test`. Each sets up all it needs, in .venv, once.

PYTHON ?= $(shell command -v python3 || command -v python3.11)
BIN := .venv/bin
READY := .venv/.ready
PYTEST := $(BIN)/python -m pytest

PROOFS := $(CURDIR)/.proofs

# One more side by side than there are cores: a quarter of the time tests wait, for deadlines, disks and other programs.
# WORKERS=0 runs one after the other, in this process.
WORKERS ?= $(shell echo $$(($$(nproc) + 1)))
PARALLEL := -n $(WORKERS) --maxprocesses=8 --dist worksteal

# Whatever the shell says: without byte code that is kept, each of hundreds of processes compiles all its modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo demo-cluster test test-long reliability fuzz bench lint format proto clean

demo: $(READY)
	$(BIN)/python -m examples.demo

# Needs etcd: apt-get install etcd-server.
demo-cluster: $(READY)
	$(BIN)/python -m examples.demo_cluster

# In two runs: what the second runs in its own process leaves gRPC there, beside which tests of the first can't fork.
test: $(READY)
	$(PYTEST) $(PARALLEL) -m "not long" tests/e2e tests/integration tests/hostile tests/crash
	$(PYTEST) $(PARALLEL) -m "not long" tests/unit tests/conformance

# The long tests too, then the million inputs to each parser, three quarters of an hour of them.
test-long: $(READY)
	$(PYTEST) --timeout=3600 --hypothesis-profile=search
	$(MAKE) fuzz

# The tests that publish figures, the long ones too, and docs/reliability.md from what they say.
reliability: $(READY)
	rm -rf $(PROOFS)
	TORCHCACHE_PROOFS=$(PROOFS) $(PYTEST) --timeout=14400 --hypothesis-profile=search \
		$$(grep -rl --include='test_*.py' 'from tests.proofs import' tests)
	$(BIN)/python -m tests.reliability_report $(PROOFS)

# A million inputs to each parser of others' bytes, one target after the other. TARGETS="ticket header" for those only.
fuzz: $(READY)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev,fuzz]'
	for target in $(or $(TARGETS),$$($(BIN)/python -m tests.fuzz)); do \
		$(BIN)/python -m tests.fuzz $$target --executions $(or $(EXECUTIONS),1000000) || exit 1; done

# Measures everything, and docs/benchmarks.md from what it found. SECTIONS=local,flight measures only those.
bench: $(READY)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python -m benchmarks --json docs/benchmarks/results.json --report $(if $(SECTIONS),--only $(SECTIONS))

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(READY)
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. torchcache/wire/v1/cache.proto

clean:
	rm -rf .venv .demo .demo-cluster $(PROOFS) .mypy_cache .ruff_cache .hypothesis .import_linter_cache

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "torchcache needs Python 3.11 or later; found: $$($(PYTHON) --version). Set PYTHON=..."; exit 1; }
	@$(BIN)/python -c '' 2>/dev/null || $(PYTHON) -m venv .venv \
		|| { echo "No venv in this Python. On Debian: apt-get install python3-venv"; exit 1; }
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e '.[dev]'
	@touch $@
