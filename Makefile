# Two commands: `make demo` runs the whole path on a small real data set, `make test` runs every check.
# Both set up .venv from requirements.txt when it is missing or out of date.

PYTHON ?= python3
BIN := .venv/bin
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM := false
# Empty is off: a suite of a hundred processes compiles each file once.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-one test-other drills lint types layers clean help

help:
	@echo "make demo   images in, a HuggingFace encoder out; see runs/demo/report.html"
	@echo "make test   every check: style, types, layers, tests"
	@echo "make drills faults of a cluster, played through on a pretend SLURM (needs root and Debian's slurm packages)"
	@echo "make clean  remove what the demo wrote (data/demo, runs/demo)"

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed, got " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	# Two OpenCV wheels share one folder: the one with selective search must have written it last.
	$(BIN)/python -c 'import cv2; cv2.ximgproc' 2>/dev/null || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall opencv-contrib-python-headless==5.0.0.93
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	touch $@

demo: .venv/ready
	@$(BIN)/python tools/demo.py

# Two pytests share the suite (tests/sharing.py), the second after the types; each prints when it ends.
test: lint
	@taken=$$(mktemp -d) || exit 1; \
	$(MAKE) --no-print-directory --jobs=2 --keep-going --output-sync TAKEN="$$taken" test-one types layers test-other; \
	code=$$?; \
	[ $$(find "$$taken" -name '.whole-*' | wc -l) = 2 ] || { echo "a pytest ended before its last test"; code=1; }; \
	rm -rf "$$taken"; exit $$code

test-one test-other:
	$(BIN)/python -m pytest --share="$(TAKEN)"

drills: .venv/ready
	$(BIN)/python -m pytest -m drill

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

layers: .venv/ready
	$(BIN)/lint-imports

clean:
	rm -rf data/demo runs/demo
