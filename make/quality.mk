# Releases and quality gates. The Makefile includes this file and makes the environment that READY names.
VENV ?= .venv
BIN := $(VENV)/bin
READY ?=
APP_VENV := .cache/app-venv
APP_READY := $(APP_VENV)/.ready
SCRIPTS = $(shell grep -slE '^#!.*python' bin/*)
SHELL_SCRIPTS = $(shell grep -rlIE --exclude-dir=.git --exclude-dir=.venv --exclude-dir=.cache --exclude-dir=.lab --exclude='*.j2' '^\#!.*\b(ba|da)?sh$$' .ci bin make roles molecule tests 2>/dev/null)
TYPES := .cache/types/ansible/module_utils
UV_COMPILE = $(CURDIR)/$(BIN)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 \
	--no-emit-index-url --custom-compile-command 'make lock'
UNITS := unit-service unit-ansible
LINTERS := lint-ansible lint-yaml lint-python lint-types lint-app-types lint-shell lint-docs lint-secrets

.PHONY: release verify-release audit hooks lock lint $(LINTERS) unit $(UNITS) format docs app-venv

release: $(READY) ## build and sign dist/atlas-VERSION.tar.gz
	@$(BIN)/python bin/build-release

verify-release: $(READY) ## check a release as a host does [RELEASE=FILE]
	@$(BIN)/python bin/verify-release $(RELEASE)

audit: $(READY) ## known vulnerabilities of all locked packages; says so when it could not ask
	@$(BIN)/python bin/audit

hooks: $(READY) ## keep secrets out of commits: a pre-commit hook for this checkout
	@git config core.hooksPath bin/hooks

lock: $(READY) ## take newer versions into the four lock files
	$(UV_COMPILE) --upgrade requirements.in -o requirements.lock
	cd app && $(UV_COMPILE) --upgrade requirements.in -o requirements.lock
	cd app && $(UV_COMPILE) --upgrade requirements-dev.in -o requirements-dev.lock
	cd app && $(UV_COMPILE) --upgrade bench/requirements.in -o bench/requirements.lock

lint: $(READY) $(APP_READY) ## every static check, side by side
	@$(MAKE) --no-print-directory --keep-going --output-sync=target -j$(shell nproc) $(LINTERS)

# Roles, playbooks and molecule, without network: collections come with the ansible package.
lint-ansible:
	@PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/ansible-lint --nocolor -f pep8

lint-yaml:
	@$(BIN)/yamllint --strict .

lint-python:
	@$(BIN)/ruff check --quiet . $(SCRIPTS)
	@$(BIN)/ruff format --quiet --check . $(SCRIPTS) || { echo "Some files are not formatted. Mend it: make format" >&2; exit 1; }

# Two runs: modules see module_utils by Ansible's name for them, scripts in bin by their own.
lint-types: $(TYPES)
	@$(BIN)/mypy --no-error-summary $(TYPES) plugins/modules plugins/inventory plugins/filter tests molecule
	@MYPYPATH=plugins/module_utils $(BIN)/mypy --no-error-summary $(SCRIPTS)

lint-app-types: $(APP_READY)
	@cd app && $(CURDIR)/$(APP_VENV)/bin/mypy --no-error-summary src

lint-shell:
	@$(BIN)/shellcheck $(SHELL_SCRIPTS)

lint-docs:
	@$(BIN)/python bin/generate-docs --check

lint-secrets:
	@$(BIN)/python bin/scan-secrets

unit: $(READY) $(APP_READY) ## tests that need no lab
	@$(MAKE) --no-print-directory --keep-going --output-sync=target -j$(shell nproc) $(UNITS)

unit-service: $(APP_READY)
	@cd app && $(CURDIR)/$(APP_VENV)/bin/pytest -q

unit-ansible:
	@$(BIN)/pytest -q

format: $(READY) ## format the Python code
	@$(BIN)/ruff check --quiet --fix-only . $(SCRIPTS)
	@$(BIN)/ruff format . $(SCRIPTS)

docs: $(READY) ## write the roles' README tables and docs/reference from their specifications
	@$(BIN)/python bin/generate-docs

app-venv: $(APP_READY)

# The service's own environment, for its tests and type checks.
$(APP_READY): app/requirements-dev.lock | $(READY)
	@echo "app environment: installing"
	@$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(APP_VENV)
	@$(BIN)/uv pip sync --quiet --require-hashes --python $(APP_VENV)/bin/python app/requirements-dev.lock
	@touch $@

$(TYPES):
	@mkdir -p $(@D)
	@ln -sfn ../../../plugins/module_utils $@
