# `make` alone lists the targets. Everything runs in $(VENV); no tool is taken from the machine but
# python3 (3.11+), bash and, for the registry tests, redis-server.
SHELL := bash
VENV ?= .venv
TOOLS ?= .cache/tools
UP_FLAGS ?=
PYTEST_FLAGS ?=
# Several pytest workers on a few cores: one math thread each, or they fight over the cores.
TEST_ENV := OMP_NUM_THREADS=1 PYTHONPATH=.:proto/gen
RUNTIME_EXTRAS := engine
TEST_EXTRAS := test

.PHONY: help up install install-test test check proto proto-check helm cluster-test tools loadtest images clean
.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

up: install ## install, start everything on this machine, answer one demo request, keep serving
	@scripts/foreground.sh $(VENV)/bin/dspark up --demo-request $(UP_FLAGS)

install: ## create $(VENV) with all that `dspark up` needs (CPU torch; TORCH=default for CUDA)
	@scripts/install.sh $(VENV) $(RUNTIME_EXTRAS)

install-test:
	@scripts/install.sh $(VENV) $(TEST_EXTRAS)

test: install-test tools ## the default test suite: CPU, offline
	$(TEST_ENV) $(VENV)/bin/python -m pytest -n 2 --dist loadgroup -m "not slow and not gpu and not cluster" $(PYTEST_FLAGS)

check: install-test proto-check ## lint, format, types, import rules, generated code
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(TEST_ENV) $(VENV)/bin/python -m pytest -q tests/architecture

proto: install-test ## regenerate proto/gen
	PYTHON=$(VENV)/bin/python scripts/generate_proto.sh

proto-check: install-test
	PYTHON=$(VENV)/bin/python scripts/check_proto.sh

helm: install-test tools ## lint, render, validate and package the chart; lint Dockerfile and compose file
	DSPARK_REQUIRE_HELM=1 $(TEST_ENV) $(VENV)/bin/python -m pytest -n 2 tests/integration/deploy

cluster-test: install-test tools ## install the chart on the cluster of DSPARK_CLUSTER_KUBECONFIG, replace pods under load
	$(TEST_ENV) $(VENV)/bin/python -m pytest -m cluster tests/cluster

tools: install-test
	@scripts/fetch_helm.sh $(TOOLS) $(VENV)/bin/python || \
	  echo "tools: helm could not be fetched; the chart's tests will skip"

loadtest: install-test ## stream chats against a running gateway (DSPARK_URL, LOCUST_FLAGS)
	$(VENV)/bin/locust -f loadtest/locustfile.py --headless --host $${DSPARK_URL:-http://127.0.0.1:8000} \
	  --users 4 --spawn-rate 4 --run-time 60s $(LOCUST_FLAGS)

images: ## build the four service images with Docker
	docker compose build

clean: ## remove the environment and caches
	rm -rf $(VENV) .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis build dist *.egg-info
