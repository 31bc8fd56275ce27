# `make` or `make help` lists the targets.
.DEFAULT_GOAL := help
PYTHON := .venv/bin/python
TESTCLUSTER := PYTHONPATH=tests/cluster $(PYTHON) -m testcluster
DEMO := videojob-out

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.PHONY: setup
setup: ## Install everything that tests need: packages, .venv, Go where missing
	@.ci/setup test

.PHONY: demo
demo: ## Render a small VideoJob on 4 CPU ranks to an S3 server on this machine
	@test -x $(PYTHON) || .ci/setup demo
	@test -d $(DEMO)/tiny-wan || .venv/bin/videojob tiny-model $(DEMO)/tiny-wan
	@VIDEOJOB_S3_SERVER=$$($(TESTCLUSTER).build versitygw) .venv/bin/videojob render manifests/samples/00-local.yaml

.PHONY: build
build: ## Build Kubernetes, etcd, containerd, runc, CoreDNS and versitygw into the cache (14 minutes, once)
	@$(TESTCLUSTER).build

.PHONY: test
test: build ## Run all tests, those on the real cluster included
	@$(PYTHON) -m pytest

.PHONY: quick
quick: ## Run the tests that need no cluster
	@$(PYTHON) -m pytest -m "not cluster"

.PHONY: check
check: ## Lint, types, layers, generated files
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/mypy
	@.venv/bin/lint-imports --no-cache | tail -5
	@$(PYTHON) -m videojob_api.crd | diff -u manifests/crd.yaml - || (echo "manifests/crd.yaml is stale: make generate"; false)

.PHONY: format
format: ## Format the code
	@.venv/bin/ruff check --fix .
	@.venv/bin/ruff format .

.PHONY: generate
generate: ## Generate manifests/crd.yaml from the API's models
	@$(PYTHON) -m videojob_api.crd > manifests/crd.yaml

.PHONY: cluster
cluster: build ## Keep a real cluster up for hand work and print its KUBECONFIG
	@$(TESTCLUSTER)

.PHONY: constraints
constraints: ## Pin the versions that are installed now
	@(head -1 constraints.txt; $(PYTHON) -m pip freeze --exclude-editable | sort -f) > constraints.new
	@mv constraints.new constraints.txt
