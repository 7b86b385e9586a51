# make demo    install into .venv and race four optimizers on handwritten digits
# make test    install into .venv and run the tests
# make test-cuda   on a machine with a GPU: the shared suites and every kernel there
# make bench   measure optimizer steps, write docs/measurements.md (on a quiet machine)
# make bench-peers   the same for other libraries, installed into .venv-peers
# make psgd-efficiency   memory and time of PSGD's factors, write docs/psgd_efficiency.md
# make bench-duels   our optimizers by turns with theirs, the same installation
# make lint    formatting, lint and types
# make docs    write the generated parts of README.md and docs/ again
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-cuda bench psgd-efficiency bench-peers bench-duels lint docs clean

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "heavyball needs Python 3.11, this is " + sys.version.split()[0] + "; try make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras: neither command waits for what only the other needs.
$(VENV)/installed-%: pyproject.toml constraints.txt | $(BIN)/python
	$(PIP) --editable '.[$*]'
	@touch $@

demo: $(VENV)/installed-race
	$(BIN)/heavyball race --task digits --optimizer AdamW --optimizer SFAdamW --optimizer ADOPT \
		--chain "scale_by_adam | cautious" --lr 0.003,0.01,0.03 --seeds 3 --out demo --overwrite

test: $(VENV)/installed-test
	OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# the kernels' file is no test_*.py, since test_triton.py runs it in Triton's interpreter
test-cuda: $(VENV)/installed-test
	HEAVYBALL_TEST_DEVICE=cuda $(BIN)/python -m pytest --numprocesses 4 tests/test_cuda.py \
		tests/kernels_on_triton.py tests/test_presets.py tests/test_checkpoint.py tests/test_together.py

bench: $(VENV)/installed-race
	$(BIN)/python -m heavyball.race.bench --threads 2 --out docs/measurements.md

psgd-efficiency: $(VENV)/installed-race
	$(BIN)/python -m heavyball.race.bench.psgd --threads 2 --out docs/psgd_efficiency.md

PEERS := .venv-peers
$(PEERS)/installed: heavyball/race/bench/peers.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --requirement heavyball/race/bench/peers.txt
	@touch $@

bench-peers: $(VENV)/installed-race $(PEERS)/installed
	$(BIN)/python -m heavyball.race.bench --peers --threads 2 --out docs/measurements.md

bench-duels: $(VENV)/installed-race $(PEERS)/installed
	$(BIN)/python -m heavyball.race.bench --duel all --threads 2 --out docs/measurements.md

lint: $(VENV)/installed-lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/installed-race
	$(BIN)/python docs/build.py

clean:
	rm -rf $(VENV) $(PEERS) demo build *.egg-info
