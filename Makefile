# Needs make and Python 3.11 or later with venv; all else is installed into .venv.
#   make demo    out/demo.mp4, a drawn head that speaks
#   make test    lint, types, imports, unit tests
#   make test-versions   fast tests with the oldest and the newest dependencies
#   make test-thorough   tests that take long, too
#   make test-clients    clients of video servers, as they are installed; needs the network
#   make audit   known vulnerabilities of the dependencies; needs the network
#   make dockerfile   the steps of deploy/Dockerfile in clean Debian roots; as root, with debootstrap
#   make bench   benchmarks; an entry in benchmarks/results/history
#   make clean   remove what these made
# PYTHON=python3.12 picks the interpreter, TORCH=torch==2.11.0 another PyTorch; an empty TORCH=
# leaves the version to pyproject.toml. STRICT=1 makes it an error where an interpreter of
# `make test-versions` is not installed; OLDEST_TORCH=2.13.0 has another PyTorch there. BENCH=--benchmark-compare=FILE gives pytest more options.

PYTHON ?= python3
TORCH ?= torch==2.13.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

DEMO := "A woman with long black hair in a yellow shirt on a pink background looks into the camera\
    and says: ho ba hu bu ge de pi bi pi ke gu"

# What `make test-versions` runs, within two minutes of one core.
VERSION_EXTRAS := onnx,otel,serve,test
FAST := runtime/test_request.py runtime/test_files.py runtime/test_hooks.py runtime/test_threads.py \
    runtime/media/test_freed.py runtime/media/test_mp4.py \
    runtime/media/test_sound.py runtime/model runtime/pipeline/test_golden.py \
    runtime/weights/test_checkpoint.py \
    runtime/weights/test_shipped.py runtime/weights/test_t5gemma.py runtime/cli/test_options.py
SLOW := windows_cover_the_sound or less_than_two_shards or imports_no_model_library

# What `make audit` passes over: a PT2 archive can run code in PyTorch, which no release is known to
# mend. No such archive is read here.
ACCEPTED := --ignore-vuln CVE-2026-136426 --ignore-vuln CVE-2026-136427

.PHONY: audit bench demo dockerfile test test-clients test-thorough test-versions test-oldest test-newest install-versions lint types imports unit clean

test: lint types imports unit

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.installed
	$(BIN)/mypy

imports: $(VENV)/.installed
	$(BIN)/lint-imports --no-cache

# Two workers of one thread each; a file's tests stay together, for what they share, and files in
# the order of tests/conftest.py.
unit: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

# Those too that take long.
test-thorough: $(VENV)/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder --thorough

# Side by side, each on a core; what one prints is shown once it is done.
test-versions:
	+@$(MAKE) --no-print-directory --jobs=2 --output-sync=recurse test-oldest test-newest

# Each in a virtual environment of its own, with the package installed as users have it.
test-oldest:
	+@$(call with_python,3.11,oldest,run-oldest)

test-newest:
	+@$(call with_python,3.13,newest,run-newest)

# Clients of others against `magihuman serve` with nano, each in an environment of its own. What
# cannot be installed is skipped.
test-clients: $(VENV)/.installed .clients/.installed
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -p no:cacheprovider tests/runtime/serving/clients --clients .clients

.clients/.installed:
	mkdir -p .clients
	$(PYTHON) -m venv .clients/litellm
	-.clients/litellm/bin/python -m pip install --quiet 'litellm[proxy]'
	$(PYTHON) -m venv .clients/aiperf
	-.clients/aiperf/bin/python -m pip install --quiet aiperf
	-npm install --silent --prefix .clients openai
	touch $@

# What takes longest of it, mostly downloads.
install-versions:
	@$(call with_python,3.11,oldest,.venv-oldest/.installed)
	@$(call with_python,3.13,newest,.venv-newest/.installed)

.venv-oldest/.installed: pyproject.toml .ci/oldest.py
	$(call interpreter,3.11) -m venv .venv-oldest
	.venv-oldest/bin/python .ci/oldest.py $(subst $(comma), ,$(VERSION_EXTRAS)) \
	    $(if $(OLDEST_TORCH),| sed '/^triton==/d; s/^torch==.*/torch==$(OLDEST_TORCH)/') \
	    > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install -c .venv-oldest/constraints.txt '.[$(VERSION_EXTRAS)]'
	touch $@

.venv-newest/.installed: pyproject.toml
	$(call interpreter,3.13) -m venv .venv-newest
	.venv-newest/bin/python -m pip install --upgrade --upgrade-strategy eager \
	    '.[$(VERSION_EXTRAS)]'
	touch $@

# The package again, and not what it needs: the tests are of this tree. Then they, and the command
# from a prompt to the score of a clip.
run-%: .venv-%/.installed
	.venv-$*/bin/python -m pip install --quiet --no-deps --force-reinstall .
	.venv-$*/bin/python -m pip list | grep -iE '^($(SHOWN)) '
	OMP_NUM_THREADS=1 .venv-$*/bin/pytest -q -p no:cacheprovider \
	    $(addprefix tests/,$(FAST)) -k 'not ($(SLOW))'
	mkdir -p out
	.venv-$*/bin/magihuman --help > out/help-$*.txt
	.venv-$*/bin/magihuman generate --out out/$*.mp4 --prompt $(DEMO) --seconds 1
	.venv-$*/bin/magihuman score out/$*.mp4 --prompt $(DEMO)

# Of what is installed for `make test`, and of the oldest releases that users may have. `--strict`
# fails where the index tells nothing of a package: it would pass otherwise.
audit: $(VENV)/.installed .venv-audit/.installed
	mkdir -p out
	$(PIP) list --format=freeze --exclude-editable --exclude pip | sed 's/+.*//' > out/audit-installed.txt
	$(BIN)/python .ci/oldest.py cuda onnx otel serve tensorrt > out/audit-oldest.txt
	status=0; for list in installed oldest; do echo "$$list:"; .venv-audit/bin/pip-audit --strict \
	    --progress-spinner off --no-deps --disable-pip -r out/audit-$$list.txt $(ACCEPTED) || status=1; \
	    done; exit $$status

.venv-audit/.installed:
	$(PYTHON) -m venv .venv-audit
	.venv-audit/bin/python -m pip --disable-pip-version-check install pip-audit
	touch $@

# LENT: files and folders that pip needs in there, such as a mirror.
dockerfile: $(VENV)/.installed
	$(BIN)/python .ci/dockerfile.py $(LENT)

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
	rm -rf $(VENV) .clients .venv-audit .venv-oldest .venv-newest out build dist .mypy_cache .pytest_cache .ruff_cache .benchmarks

comma := ,
SHOWN := accelerate|av|diffusers|fastapi|numpy|pillow|ray|rich|scipy|torch|transformers|typer

# The interpreter of a version, from the path or from pyenv; nothing where there is none. Those of
# pyenv on the path may be for versions that are not installed.
interpreter = $(shell for python in python$(1) "$$(ls -d "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$(1)*/bin/python$(1) 2>/dev/null | tail -1)"; do \
    "$$python" -c 'import venv, ensurepip' 2>/dev/null && echo "$$python" && break; done)

# A target where the interpreter is there, timed; else a line that says that it is not.
with_python = if [ -z "$(call interpreter,$(1))" ]; then \
    echo "$(2) dependencies: skipped, python$(1) is not installed"; [ -z "$(STRICT)" ]; \
    else start=$$(date +%s); $(MAKE) --no-print-directory $(3) && \
    echo "$(2) dependencies: $(3) on Python $(1) passed in $$(($$(date +%s) - start)) s"; fi

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
