# The commands of this project: make help
MAKEFLAGS += --no-print-directory
SHELL := /bin/bash
.DEFAULT_GOAL := help

ENV ?= development
LAB ?= $(ENV)
SCENARIOS := $(notdir $(patsubst %/molecule.yml,%,$(wildcard molecule/*/molecule.yml)))
SCENARIO ?=
VENV := .venv
READY := bootstrap
# Certificates as this machine trusts them, also those of its own network.
export UV_SYSTEM_CERTS := true
export PATH := $(CURDIR)/$(VENV)/bin:$(PATH)

-include make/*.mk

.PHONY: help bootstrap up down vault test test-full test-lab unit molecule rehearse leaks rotations

help: ## this list
	@echo "make COMMAND:"
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{ printf "  %-16s %s\n", $$1, $$2 }'

bootstrap: ## Debian packages and the virtual environment
	@bin/bootstrap

up: ## raise a lab with Atlas in it [ENV=development] [LAB=$ENV]
	@bin/up "$(ENV)" "$(LAB)"

down: bootstrap ## remove what `make up` made for a lab [LAB=development]
	@ANSIBLE_DISPLAY_OK_HOSTS=false ansible-playbook -i localhost, playbooks/lab_down.yml -e "lab_name=$(LAB)"

vault: bootstrap ## secrets of a real environment, at first use: ENV=production
	@$(VENV)/bin/python bin/new-vault "$(ENV)"

rehearse: bootstrap ## a promotion and deploy to ENV in a lab of its shape, under load, judged [RELEASE=FILE] [PRESENT=FILE] [KEEP=1]
	@$(VENV)/bin/python bin/rehearse "$(ENV)" $(if $(RELEASE),--release "$(RELEASE)") $(if $(PRESENT),--present "$(PRESENT)") \
	  $(if $(KEEP),--keep)

test: ## everything that a change must pass
	@bin/bootstrap --tests
	@mkdir -p .cache; set -o pipefail; $(MAKE) lint unit test-lab molecule 2>&1 | tee .cache/test.log || { $(show_failures); exit 1; }

# What failed stands hundreds of lines up by the time a scenario has cleaned up: it is said once more, at the end.
show_failures = echo "What failed (all of it: .cache/test.log):" >&2; \
  sed 's/\x1b\[[0-9;]*m//g' .cache/test.log | grep -E '(^|[ │])(FAILED|ERROR) [^ ]+::|(^|│ )E  |fatal: |\*\*\* \[' | tail -n 20 >&2

# Sizes of `make test-full`; each test has a smaller one of its own (docs/testing.md).
FULL_SIZES := ATLAS_CRASH_DOCUMENTS=2000 ATLAS_BLOCKED_JOBS=100000 ATLAS_EXAMPLES=1000 ATLAS_SCHEMATHESIS_EXAMPLES=200 \
  ATLAS_RECOVERY_DOCUMENTS=100000

test-full: ## the same at full size, the proofs of deploys and recovery, then the bench, whose targets are reported
	@$(FULL_SIZES) $(MAKE) test
	@$(VENV)/bin/pytest -q tests/rehearsal tests/promotion
	@$(MAKE) leaks
	@$(MAKE) rotations
	@$(MAKE) proof
	@$(FULL_SIZES) $(MAKE) recovery
	@$(MAKE) bench

leaks: bootstrap ## every playbook at -vvv --diff, then a search for all that is secret, everywhere: 20 minutes
	@$(VENV)/bin/pytest -q -x tests/leaks

rotations: bootstrap ## every kind of secret rotated under load, killed again and again: hours [LAB=NAME, one that is there]
	@$(if $(filter command line,$(origin LAB)),ATLAS_ROTATION_LAB="$(LAB)") $(VENV)/bin/pytest -q -s tests/rotation

test-lab: bootstrap ## a lab on this machine: raised, hurt in each named way, gone without a trace
	@$(VENV)/bin/pytest -q tests/lab

molecule: release ## roles and playbooks on real hosts [SCENARIO=default]
	@for scenario in $(or $(SCENARIO),$(SCENARIOS)); do \
	  [[ -f molecule/$$scenario/molecule.yml ]] || { echo "There is no scenario $$scenario: $(SCENARIOS)" >&2; exit 2; }; \
	  molecule test --scenario-name $$scenario || exit 1; \
	done
