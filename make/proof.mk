# The proofs of deploys at full size and their speed, and of recovery: docs/proof.md. The Makefile includes this file.
PROOF_LAB := test-proof
PROOF_SIZES := ATLAS_PROOF_DEPLOYS=60 ATLAS_PROOF_KILLS=50 ATLAS_PROOF_REQUESTS=100000 ATLAS_PROOF_RATE=30 ATLAS_PROOF_BAD=all
PROOFS := $(addprefix ../staging/tests/,test_zero_loss.py test_negative_controls.py test_bad_in_traffic.py) tests

.PHONY: proof recovery bench-deploy

proof: bootstrap ## zero loss at full size, in a lab like production: hours
	@bin/up production $(PROOF_LAB)
	@cd molecule/production && $(PROOF_SIZES) LAB_NAME=$(PROOF_LAB) pytest -q -s $(PROOFS); \
	  status=$$?; $(MAKE) -C $(CURDIR) down LAB=$(PROOF_LAB); exit $$status

recovery: bootstrap ## hosts destroyed under load and recovered, with both stores [ATLAS_RECOVERY_DOCUMENTS=1000]
	@$(VENV)/bin/pytest -q -s tests/recovery

bench-deploy: release ## deploys to six hosts beside a plain role [SIZE=small] [JSON=FILE]
	@$(VENV)/bin/python tests/bench/deploys.py --size $(SIZE) $(if $(JSON),--json $(abspath $(JSON)))
