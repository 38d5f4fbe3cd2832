# Two commands: `make book` and `make test`. Both set themselves up, and both may be repeated.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PAGES := _build/html
# Two workers on two cores: one thread each, or they fight over the cores.
export OMP_NUM_THREADS ?= 1

# What PyTorch and its libraries would do on another processor: no stored or tested number may notice.
ELSEWHERE := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE
# glibc gives large blocks back and has them paged in anew: up to half of a step's time on a CPU
KEEP := MALLOC_MMAP_THRESHOLD_=4294967296 MALLOC_TRIM_THRESHOLD_=8589934592
PYTEST := MODLIB_QUICK=1 $(KEEP) $(BIN)/pytest --dist loadscope -q

.PHONY: help book pages compare test elsewhere everywhere check setup notebooks clean

help:
	@echo "make book       train a first comparison, build the book, print where it is"
	@echo "make test       run every check: style, types, tests, notebooks, pages"
	@echo "make elsewhere  doctests, records and notebooks again, computed as another processor would"
	@echo "make everywhere every test under three such settings (an hour)"
	@echo "make check      the quick checks alone: style and types"
	@echo "make notebooks  run every notebook again at full size and store its outputs"
	@echo "make clean      remove the built book (the environment in $(VENV) stays)"

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "make: Python 3.11 or newer is needed; name one with make PYTHON=/path/to/python3"; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || { \
		echo "make: python3 -m venv failed; install the venv package of your system"; exit 1; }
	@echo "make: installing into $(VENV) (once; later runs skip this)"
	@$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[book,test,dev]' || { \
		echo "make: installation failed; is the package index reachable?"; exit 1; }
	@touch $@

book: compare pages
	@echo
	@echo "The book is ready. Open its first page:"
	@echo "    file://$(CURDIR)/$(PAGES)/index.html"

compare: $(STAMP)
	@$(BIN)/modlib compare --data digits

# `pip install jupyter-book` alone brings version 2, another tool, which would rename _config.yml.
# Sphinx warns about a page only when it reads it, so a failed build leaves nothing to resume from.
pages: $(STAMP)
	@$(BIN)/python -c 'from importlib.metadata import version as v; exit(not v("jupyter-book").startswith("1."))' || { \
		echo "make: this book needs Jupyter Book 1, and version 2 is another tool; run: make -B setup"; exit 1; }
	@$(BIN)/python tools/address.py
	@echo "make: building the pages"
	@mkdir -p _build
	@$(BIN)/jupyter-book build . -W -n --keep-going -q >_build/log 2>&1 || { \
		grep -a -E 'WARNING|ERROR' _build/log || cat _build/log; rm -rf _build; \
		echo "make: the book must build without warnings; mend these and build again"; exit 1; }

check: $(STAMP)
	@$(BIN)/ruff check . || { echo "make: ruff found something to mend (above)"; exit 1; }
	@$(BIN)/ruff format --check --quiet . || { echo "make: run $(BIN)/ruff format ."; exit 1; }
	@$(BIN)/mypy || { echo "make: mypy found a type error (above)"; exit 1; }

test: check
	@for name in chromium chromium-browser google-chrome; do command -v $$name; done | grep -q . || \
		echo "make: there is no Chromium here, so the pages are tested without a browser"
	@$(PYTEST) -n 2

elsewhere: $(STAMP)
	@env $(ELSEWHERE) $(PYTEST) -n 2 modlib book tests/test_records.py tests/test_transfer.py

everywhere: $(STAMP)
	@env ATEN_CPU_CAPABILITY=default $(PYTEST) -n 2
	@env $(ELSEWHERE) $(PYTEST) -n 2
	@env $(ELSEWHERE) OMP_NUM_THREADS=2 $(PYTEST) -n 1

notebooks: $(STAMP)
	@$(BIN)/jupyter execute --inplace book/*.ipynb book/*/*.ipynb
	@$(BIN)/python tools/tidy.py book/*.ipynb book/*/*.ipynb

clean:
	rm -rf _build
