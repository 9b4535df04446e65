# make demo: GRPO from base/, a tiny model that sees, and its evaluation, on two CPU cores.
# make test: the whole suite. Both make .venv first, make test with what tests alone need, in either
# order; PYTHON=… chooses the interpreter (3.11+).
PYTHON ?= python3
BIN := .venv/bin
RANKS ?= 2
RUNS ?= runs/demo
TORCHRUN := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc_per_node=$(RANKS)

.PHONY: demo test clean

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/installed-for-tests: .venv/installed requirements-test.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-test.txt
	touch $@

# Qwen2.5's true vocabulary lies in this wheel; one test reads it from there, nothing is installed
.venv/vocabulary: .venv/installed
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps \
		--dest $@ dashscope==2.0.2

demo: .venv/installed
	rm -rf $(RUNS)
	@echo "== 1/2 GRPO: base/, a tiny model that sees, samples, is scored, and improves"
	$(TORCHRUN) grpo_vl.py --preset tiny --out $(RUNS)/grpo
	@echo "== 2/2 evaluation on held-out scenes, before and after"
	$(BIN)/python eval.py demo base $(RUNS)/grpo --out $(RUNS)

test: .venv/installed-for-tests .venv/vocabulary
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests

clean:
	rm -rf .venv runs .pytest_cache .ruff_cache .hypothesis
