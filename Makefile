# make run     set up, then the first run: two cores, no key, no GPU
# make test    set up, then all tests
# make check   lint, types, docs
.PHONY: setup run test check clean

VENV := .venv
OUT := runs/nano_sft

run: setup
	$(VENV)/bin/iterft run nano_sft --out $(OUT)

test: setup
	OMP_WAIT_POLICY=PASSIVE OPENBLAS_NUM_THREADS=1 $(VENV)/bin/pytest -n 2 --dist worksteal

check: setup
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/python scripts/check_docs.py
	$(VENV)/bin/python scripts/build_reference.py --check

setup: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml scripts/setup.sh
	scripts/setup.sh

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
