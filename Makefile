# sale-prefill: `make demo` and `make test` need nothing set up before. `make` alone lists the targets.

PYTHON ?= python3
ACCELERATOR ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo cuda || echo cpu)
CONSTRAINTS := $(if $(filter cuda,$(ACCELERATOR)),constraints-cuda.txt,constraints.txt)

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.set-up-$(ACCELERATOR)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(CONSTRAINTS)

PROTOS := $(wildcard proto/sale_prefill/v1/*.proto)
SERVICE_PROTOS := $(wildcard proto/sale_prefill/v1/*_service.proto)
PROTO_OUT ?= proto
RELEASES := $(shell ls proto/releases/*.binpb 2>/dev/null | sort -V)

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test test-quick lint format proto check-proto proto-release check-main check-attention check-fidelity check-kv fidelity-figures check-kernels check-sanitize bench-attention client-sync wheel clean
.DELETE_ON_ERROR:

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## make .venv with pinned versions; CUDA torch where nvidia-smi finds a GPU

# torch goes first and by itself, so that nothing else decides which build of it is taken.
$(STAMP): pyproject.toml $(CONSTRAINTS) | $(BIN)/pip
	@echo "setting up $(VENV) ($(ACCELERATOR)); the first time this fetches some hundred MB, with CUDA several GB"
	$(PIP_INSTALL) torch
	$(PIP_INSTALL) hatchling
	$(PIP_INSTALL) --no-build-isolation -e '.[dev]'
	@rm -f $(VENV)/.set-up-* && touch $@

$(BIN)/pip:  # not bin/python: that is there before an interrupted venv is whole
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "$(PYTHON) is missing or older than 3.11: install Python 3.11 or newer, or say make PYTHON=..." >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "$(PYTHON) cannot make virtual environments: install them (Debian, Ubuntu: apt-get install python3-venv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

demo: $(STAMP)  ## fetch the default model, start a server, drive it through the client
	@$(BIN)/python -m examples.demo $(ARGS)

serve: $(STAMP)  ## run a server: make serve MODEL=<directory, hub id or .gguf> ARGS='--port 50051'
	$(BIN)/sale-prefill serve $(if $(MODEL),--model '$(MODEL)') $(ARGS)

test: $(STAMP)  ## run all tests
	$(BIN)/python -m pytest $(ARGS)

test-quick: $(STAMP)  ## run the tests that take seconds
	$(BIN)/python -m pytest -m 'not slow' $(ARGS)

lint: $(STAMP)  ## ruff, mypy, buf
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	cd proto && ../$(BIN)/buf lint
	cd proto && ../$(BIN)/buf format --diff --exit-code
	$(if $(RELEASES),cd proto && ../$(BIN)/buf breaking --against releases/$(notdir $(lastword $(RELEASES))))

format: $(STAMP)  ## rewrite Python and .proto files in the one style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	cd proto && ../$(BIN)/buf format --write

proto: $(STAMP)  ## regenerate the stubs beside the .proto files
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=$(PROTO_OUT) --pyi_out=$(PROTO_OUT) $(PROTOS)
	$(BIN)/python -m grpc_tools.protoc -Iproto --grpc_python_out=$(PROTO_OUT) $(SERVICE_PROTOS)

check-proto: $(STAMP)  ## fail where the committed stubs are not what the .proto files generate
	@out=$$(mktemp -d) && trap 'rm -rf "$$out"' EXIT && $(MAKE) --no-print-directory proto PROTO_OUT="$$out" && \
	for stub in "$$out"/sale_prefill/v1/* proto/sale_prefill/v1/*_pb2*; do \
	  diff "$$out/sale_prefill/v1/$${stub##*/}" "proto/sale_prefill/v1/$${stub##*/}" || \
	    { echo "$${stub##*/} is not what the .proto files generate: run make proto" >&2; exit 1; }; \
	done && echo "stubs match"

proto-release: $(STAMP)  ## keep the contract as an image that buf breaking compares with: make proto-release VERSION=v0.1.0
	$(if $(VERSION),,$(error say VERSION=v0.1.0))
	cd proto && ../$(BIN)/buf build --output releases/$(VERSION).binpb

check-main: $(STAMP)  ## measure what the main job promises; fail where a promise falls short
	$(BIN)/python -m benchmarks.check_main $(ARGS)

check-attention: $(STAMP)  ## measure what CPU attention promises, on real traces; fail where a promise falls short
	$(BIN)/python -m benchmarks.check_attention $(ARGS)

check-fidelity: $(STAMP)  ## measure what calibrated SALE loses, and its guard; fail where a promise falls short
	$(BIN)/python -m benchmarks.check_fidelity $(ARGS)

check-kv: $(STAMP)  ## measure what KV as a product promises: hand-over, reuse, tiers, crashes; fail where a promise falls short
	$(BIN)/python -m benchmarks.check_kv $(ARGS)

FIDELITY_RESULTS := $(wildcard benchmarks/results/retrieval.json benchmarks/results/evaluation.json)

fidelity-figures: $(STAMP)  ## draw docs/figures/fidelity-*.svg again from the committed results
	$(BIN)/python -m sale_fidelity.evaluation.figures $(FIDELITY_RESULTS) --output docs/figures --prefix fidelity-

check-kernels: $(STAMP)  ## compile all CUDA kernels for all targets, no GPU needed; fail on spills or other instructions
	$(BIN)/python -m pytest tests/contract/test_cuda_build.py $(ARGS)

check-gpu: $(STAMP)  ## measure what attention promises on one H100; fail where a promise falls short
	$(BIN)/python -m benchmarks.check_gpu $(ARGS)

# libasan must be in the process before python is; leaks are the interpreter's own.
check-sanitize: $(STAMP)  ## run the conformance kit on CPU kernels built for AddressSanitizer and UBSan
	@cxx=$${CXX:-g++} && SALE_PREFILL_CPU_SANITIZE=address,undefined ASAN_OPTIONS=detect_leaks=0 \
	  UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
	  LD_PRELOAD="$$($$cxx -print-file-name=libasan.so) $$($$cxx -print-file-name=libubsan.so)" \
	  $(BIN)/python -m pytest tests/conformance -k '(cpu-avx512 and not vnni) or cpu-avx2' $(ARGS)

bench-attention: $(STAMP)  ## time attention by backend, length and trace: make bench-attention ARGS='--lengths 8192'
	$(BIN)/python -m benchmarks.attention $(ARGS)

client-sync: $(STAMP)  ## regenerate the blocking client from the asyncio one
	$(BIN)/python tools/generate_sync_client.py

wheel: $(STAMP)  ## build the wheel into dist/
	$(BIN)/python -m pip wheel --quiet --disable-pip-version-check --no-deps --no-build-isolation --wheel-dir dist .

clean:  ## remove what builds and tests leave; keeps .venv and the model cache
	rm -rf build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find client server proto tests benchmarks examples -type d -name __pycache__ -prune -exec rm -rf {} +
