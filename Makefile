# Shortcuts; each target is one command that can be typed as well.
PYTHON ?= python

.PHONY: help train compare

help:
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

train: ## train the arithmetic example with CAPO: warm start and 60 updates
	$(PYTHON) -m capo.cli train examples/arithmetic/capo.yaml

compare: ## CAPO against GRPO on three seeds
	$(PYTHON) examples/arithmetic/compare.py
