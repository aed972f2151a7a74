# make run    environment, starter model, app on http://127.0.0.1:7860
# make test   environment, tests: a quarter of an hour
# make nightly  all tests, the slow ones and every screen in Chromium too: half an hour
# make faults workers and the app are killed, checkpoints damaged, disks filled: some minutes
PYTHON ?= python3
BIN := .venv/bin
SPREAD := -n logical --maxprocesses 4 --dist loadfile

.PHONY: run test test-fast nightly faults lint browser screenshots clean

run: .venv/ready
	-$(BIN)/python -m lora_studio fetch starter
	$(BIN)/python app.py

test: .venv/ready-tests browser lint test-fast
	$(BIN)/python -m pytest -m "(browser or starter) and not nightly"

test-fast: .venv/ready-tests
	$(BIN)/python -m pytest $(SPREAD) -m "not browser and not starter and not nightly"

nightly: .venv/ready-tests browser lint
	$(BIN)/python -m pytest $(SPREAD) -m "not browser and not starter"
	$(BIN)/python -m pytest -m "browser or starter"

faults: .venv/ready-tests
	$(BIN)/python -m benchmarks.faults --quick

lint: .venv/ready-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Browser tests use the system's Chromium; where it cannot be installed they are skipped with the reason.
browser:
	@command -v chromium >/dev/null || { [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null \
		&& (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq chromium >/dev/null); } \
		|| echo "chromium is not installed and cannot be: browser tests will be skipped"

screenshots: .venv/ready-tests
	$(BIN)/python -m tests.screenshots assets/screenshots

# torch first and pinned: a looser range may bring gigabytes of CUDA libraries to a machine without a GPU.
.venv/ready: requirements.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -r requirements.txt
	touch $@

.venv/ready-tests: .venv/ready tests/requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -r tests/requirements.txt
	touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
