# Figures beside what they are compared with: docs/bench.md. The Makefile includes this file.
BENCH_VENV := .cache/bench-venv
BENCH_READY := $(BENCH_VENV)/.ready
SIZE ?= full
JSON ?=

.PHONY: bench

bench: $(BENCH_READY) ## throughput, latency, memory, deploys against other software [SIZE=small] [JSON=FILE]; bench-PART alone
	@$(call run_bench,)
	@$(MAKE) bench-deploy $(if $(JSON),JSON=$(basename $(JSON))-deploy.json)

bench-%: $(BENCH_READY)
	@$(call run_bench,$*)

run_bench = cd app && PYTHONPATH=src:tests:. $(CURDIR)/$(BENCH_VENV)/bin/python -m bench $(1) --size $(SIZE) \
	$(if $(JSON),--json $(abspath $(JSON)))

# An environment of its own: nothing else needs the packages that Atlas is measured against.
$(BENCH_READY): app/bench/requirements.lock
	@bin/bootstrap --tests
	@echo "bench environment: installing"
	@$(VENV)/bin/uv venv --quiet --clear --python $(VENV)/bin/python $(BENCH_VENV)
	@$(VENV)/bin/uv pip sync --quiet --require-hashes --python $(BENCH_VENV)/bin/python app/bench/requirements.lock
	@touch $@
