PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help demo test soak lowest lint audit survey bench clean

help:
	@echo "make demo    the main job on digits, without a network (about two minutes)"
	@echo "make test    install everything into $(VENV) if needed, and run the tests"
	@echo "make soak    the same with the long tests at their full counts (takes far longer)"
	@echo "make lowest  the tests with the oldest versions that pyproject.toml admits, in $(VENV)-lowest"
	@echo "make lint    ruff and pyright"
	@echo "make audit   known vulnerabilities of what is installed (needs a network)"
	@echo "make survey  inject into every timm architecture (slow)"
	@echo "make bench   time and memory of adapters against the frozen model and PEFT (slow; wants a quiet machine)"
	@echo "make clean   remove $(VENV) and caches"

$(VENV)/.installed: pyproject.toml
	@echo "Installing into $(VENV) (about 5 GB, a few minutes) ..."
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --no-compile $(CONSTRAINTS) --editable '.[dev]'
	@$(BIN)/python -m compileall -q -j 0 $(VENV)/lib >/dev/null 2>&1 || true # on all cores, where pip takes one
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/python -m nolora_vision.benchmark.demo

test: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

soak: $(VENV)/.installed
	NOLORA_SOAK=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

lowest:
	@test -e $(VENV)-lowest/.installed || $(MAKE) $(VENV)-lowest/.installed VENV=$(VENV)-lowest CONSTRAINTS='-c .ci/lowest.txt'
	OMP_NUM_THREADS=1 $(VENV)-lowest/bin/python -m pytest -n 2 -W default

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

audit: $(VENV)/.installed
	$(BIN)/python .ci/audit

survey: $(VENV)/.installed
	$(BIN)/python -m nolora_vision.benchmark.survey

bench: $(VENV)/.installed
	$(BIN)/python -m nolora_vision.benchmark.speed

clean:
	rm -rf $(VENV) $(VENV)-lowest .pytest_cache .ruff_cache dist
