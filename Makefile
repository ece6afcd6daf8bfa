# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo demo-chat bench test test-fast test-faults check docs clean help
.DEFAULT_GOAL := help

help: ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /make \1\t/' | expand -t 18

demo: .venv/installed ## compare six methods on a real model and real data (about ten minutes, fetches 90 MB)
	@$(BIN)/graft assets pull
	@$(BIN)/graft demo

CHAT := runs/demo-chat
demo-chat: .venv/installed-chat ## tune a chat model on a task: clean, train, compare, ask (ten minutes, fetches 100 MB)
	@$(BIN)/graft assets pull smollm2-135m
	@mkdir -p $(CHAT)/data
	$(BIN)/graft data convert task:family_relationships -o $(CHAT)/data/raw.jsonl --force
	@echo "# 200 rows once more, as after joining two exports"; head -n 200 $(CHAT)/data/raw.jsonl > $(CHAT)/data/more
	@cat $(CHAT)/data/more >> $(CHAT)/data/raw.jsonl; rm $(CHAT)/data/more
	$(BIN)/graft data check $(CHAT)/data/raw.jsonl
	$(BIN)/graft data clean $(CHAT)/data/raw.jsonl -o $(CHAT)/data/train.jsonl --force
	$(BIN)/graft compare recipes/demo-chat.yaml -o $(CHAT)/compare
	$(BIN)/graft chat $(CHAT)/compare/trials/lora-*-seed1 --base --once "$(QUESTION)"
QUESTION := Oscar is married to Ruth. They have a child called Ivy. How is Ruth related to Ivy? Answer with a single word.

bench: .venv/installed-bench ## measure speed and memory beside peft, Trainer and trl: docs/benchmarks.md (40 minutes)
	@$(BIN)/graft assets pull
	@$(BIN)/graft assets pull smollm2-135m
	@$(BIN)/python -m benchmarks.speed

test: .venv/installed-dev check ## every check and test
	@$(BIN)/graft assets pull
	@$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not faults"

test-faults: .venv/installed-dev ## the tests that take long: runs killed at random moments, every simulation, generated code (ten minutes)
	@$(BIN)/pytest -m faults -s

test-fast: .venv/installed-dev ## the tests of a few seconds each
	@$(BIN)/pytest -x -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not faults"

check: .venv/installed-dev ## formatting, lint and types
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy

docs: .venv/installed-dev ## write the generated parts of the documentation anew
	@$(BIN)/python docs/generate.py

clean: ## remove .venv and caches
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache

.venv/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Graft needs Python 3.11 or newer: make PYTHON=python3.11 …")'
	@echo "making .venv"
	@$(PYTHON) -m venv .venv
	@touch $@

.venv/installed: .venv/python pyproject.toml constraints.txt
	@echo "installing Graft and what it needs (torch is about 200 MB)"
	@$(INSTALL) -e .
	@touch $@

.venv/installed-chat: .venv/installed
	@echo "installing what chat models need"
	@$(INSTALL) -e '.[chat]'
	@touch $@

.venv/installed-bench: .venv/installed
	@echo "installing what Graft is measured beside"
	@$(INSTALL) -e '.[bench]'
	@touch $@

.venv/installed-dev: .venv/installed
	@echo "installing what the tests need"
	@$(INSTALL) -e '.[dev]'
	@touch $@
