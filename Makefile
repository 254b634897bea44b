# Needs make and Python 3.11 or later with venv; all else is installed into .venv.
#   make demo    out/demo.mp4, a drawn head that speaks
#   make test    lint, types, imports, unit tests
#   make bench   benchmarks; an entry in benchmarks/results/history
#   make clean   remove what these made
# PYTHON=python3.12 picks the interpreter, TORCH=torch==2.11.0 another PyTorch; an empty TORCH=
# leaves the version to pyproject.toml. BENCH=--benchmark-compare=FILE gives pytest more options.

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

DEMO := "A woman with long black hair in a yellow shirt on a pink background looks into the camera\
    and says: ho ba hu bu ge de pi bi pi ke gu"

.PHONY: bench demo test lint types imports unit clean

test: lint types imports unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

imports: $(VENV)/.installed
	$(BIN)/lint-imports --no-cache

# Two workers of one thread each; a file's tests stay together, for what they share.
unit: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

demo: $(VENV)/.installed
	mkdir -p out
	$(BIN)/magihuman generate --model nano --out out/demo.mp4 --prompt $(DEMO)
	@$(BIN)/python -c "$$FACTS" out/demo.mp4
	$(BIN)/magihuman score out/demo.mp4 --prompt $(DEMO)
	@echo "Made by nano, a model of 15 MB that comes with the package; see README.md."

bench: $(VENV)/.installed
	mkdir -p out
	$(BIN)/pytest benchmarks/suites --benchmark-only --benchmark-max-time=0.2 \
	    --benchmark-json=out/bench.json $(BENCH)
	$(BIN)/python benchmarks/reports/history.py out/bench.json

# Linked, not copied: what is edited, added or removed is there at once.
$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c "$$CHECK_PYTHON"
	$(PYTHON) -m venv $(VENV)
	$(if $(TORCH),$(PIP) install '$(TORCH)')
	$(PIP) install -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) out build dist .mypy_cache .pytest_cache .ruff_cache .benchmarks

define CHECK_PYTHON
import sys
if sys.version_info < (3, 11):
    sys.exit("Python 3.11 or later is needed, got " + sys.version.split()[0]
             + "; name one with PYTHON=python3.12")
endef
export CHECK_PYTHON

define FACTS
import sys
import av
with av.open(sys.argv[1]) as file:
    picture, sound = file.streams.video[0], file.streams.audio[0]
    print(f"{sys.argv[1]}: {picture.codec_context.name} {picture.width}x{picture.height},",
          f"{picture.frames} frames at {float(picture.average_rate):g}/s,",
          f"{sound.codec_context.name} at {sound.sample_rate} Hz,",
          f"{file.duration / av.time_base:.2f} s")
endef
export FACTS
