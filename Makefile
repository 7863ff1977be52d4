# Two commands do everything on a fresh machine with Python 3.11 or newer and make:
#   make results   the environment, then every table and figure of the default run (config/config.yaml)
#   make test      the environment, then all tests
PYTHON ?= python3
BIN = .venv/bin
CORES ?= all

.PHONY: env results report smoke docs test test-fast benchmarks findings lint clean

env: .venv/.done

.venv/.done: pyproject.toml requirements.lock
	$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("masa needs Python 3.11 or newer; try make PYTHON=python3.12 env")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet pip==25.3
	$(BIN)/python -m pip install --constraint requirements.lock --editable '.[test]'
	touch $@

results: env
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores $(CORES) results/tables results/figures

report: env
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores $(CORES) report

smoke: env
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --cores $(CORES) --configfile config/smoke.yaml

docs: env # the documentation: build/docs/index.html
	$(BIN)/python -m sphinx -b html --fail-on-warning --keep-going --quiet docs build/docs

test: env
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -n 3

test-fast: env # a few minutes, no workflow and no long training: for the inner loop
	PATH="$(CURDIR)/$(BIN):$$PATH" $(BIN)/pytest -n 3 -m "not slow"

# one after the other, to themselves; a missed target is no error here, and stands in the table
BENCHMARKS = training_step training_loop inference tokenization calibration_speed calibration_memory mixing multiple_choice serving growth compression_growth workflow
benchmarks: env
	for name in $(BENCHMARKS); do PATH="$(CURDIR)/$(BIN):$$PATH" OMP_NUM_THREADS=1 $(BIN)/python benchmarks/$$name.py || test $$? -eq 1 || exit; done

# what was found in other packages: each script by itself, without masa; findings/README.md has the form
findings:
	@changed=0; for script in findings/*.sh; do test -e "$$script" || continue; \
	if PYTHON="$(PYTHON)" bash "$$script" > /dev/null 2>&1; then echo "ok       $$script"; \
	else echo "changed  $$script"; changed=1; fi; done; exit $$changed

lint: env
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/snakefmt --check workflow
	PATH="$(CURDIR)/$(BIN):$$PATH" snakemake --lint

clean:
	find results -mindepth 1 -maxdepth 1 ! -name reference -exec rm -rf {} +
	rm -rf .snakemake
