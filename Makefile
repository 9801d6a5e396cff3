# The whole developer interface. Needs Python 3.11-3.13 and make; everything else goes into .venv.
#
#   make demo                  train the built-in tiny model (about 5 minutes on 2 cores, once) and chat with it
#   make demo ASK="question"   the same, but answer this one question and end
#   make serve [PORT=8001]     train it if there is none, then serve it: a page to talk to, and OpenAI's API
#   make test                  lint and the whole test suite; downloads a second triton (200 MB), once
#   make lint                  ruff only
#   make bench                 the CPU benches, results under bench/results/
#   make clean                 remove .venv, caches and out/tiny

PYTHON ?= python3
BIN = .venv/bin
TINY = out/tiny
PORT = 8000
export ASK

.PHONY: demo serve test lint bench clean

demo: $(TINY)/config.json
ifdef ASK
	@$(BIN)/python generate.py --checkpoint $(TINY) --prompt "$$ASK"
else
	@$(BIN)/python generate.py --checkpoint $(TINY)
endif

serve: $(TINY)/config.json
	@$(BIN)/python serve.py --checkpoint $(TINY) --port $(PORT) --open

# A run that was interrupted goes on from its last checkpoint.
$(TINY)/config.json: | .venv/installed
	$(BIN)/python train.py --resume_from_checkpoint auto

test: lint .venv/triton-3.6/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m "not slow and not gpu"

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

bench: .venv/installed
	for file in bench/bench_*.py; do $(BIN)/python $$file || exit 1; done

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else \
	  "error: Python 3.11, 3.12 or 3.13 is needed, this is %d.%d; name one: make PYTHON=python3.12 ..." % v)'
	@echo "Setting up .venv: downloads PyTorch once, some minutes"
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --disable-pip-version-check --progress-bar on -r requirements.txt
	@touch $@

# The kernels are proven under triton 3.6 as well, which lies beside the installed one with a numpy it can work with.
.venv/triton-3.6/installed: requirements-triton36.txt | .venv/installed
	@echo "Setting up triton 3.6 for the tests: downloads 200 MB, once"
	@mkdir -p $(@D)
	$(BIN)/pip install --disable-pip-version-check --progress-bar on --no-deps --upgrade --target $(@D) -r $<
	@touch $@

clean:
	rm -rf .venv .cache .pytest_cache .ruff_cache .hypothesis $(TINY)
