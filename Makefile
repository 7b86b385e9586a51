# make demo    install into .venv and race four optimizers on handwritten digits
# make test    install into .venv and run the tests; of those that go over all presets, a part
# make test-all   every case of every test, before a release
# make test-cuda   on a machine with a GPU: the shared suites and every kernel there
# make test-newest   the tests with the newest torch, in .venv-newest (a large download); TESTS=tests/test_x.py for a part
# make test-frameworks   callbacks and recipes for ten frameworks, in .venv-frameworks
# make test-asan   the kernel suites with sanitizers in the kernels: memory and undefined behaviour
# make bench   measure optimizer steps, write docs/measurements.md (on a quiet machine)
# make bench-peers   the same for other libraries, installed into .venv-peers
# make psgd-efficiency   memory and time of PSGD's factors, write docs/psgd_efficiency.md
# make bench-duels   our optimizers by turns with theirs, the same installation
# make comparison   race six optimizers on mnist and tiny Shakespeare; an hour, make -j2 runs both at once
# make lint    formatting, lint and types
# make docs    write the generated parts of docs/ and the stubs again
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Idle threads of a kernel do not spin, and processes that tests start read the package compiled.
TESTED := OMP_WAIT_POLICY=PASSIVE PYTHONDONTWRITEBYTECODE= $(BIN)/python
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: demo test test-all test-cuda test-newest test-frameworks test-asan fuzz bench psgd-efficiency bench-peers bench-duels lint docs clean \
	comparison comparison-chars comparison-mnist

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
	HEAVYBALL_TESTS=quick $(TESTED) -m pytest --numprocesses 2 --dist worksteal

test-all: $(VENV)/installed-test
	$(TESTED) -m pytest --numprocesses 2 --dist worksteal

# the kernels' file is no test_*.py, since test_triton.py runs it in Triton's interpreter
test-cuda: $(VENV)/installed-test
	HEAVYBALL_TEST_DEVICE=cuda $(BIN)/python -m pytest --numprocesses 4 tests/test_cuda.py \
		tests/kernels_on_triton.py tests/test_presets.py tests/test_checkpoint.py tests/test_together.py

# not what constraints.txt pins, but the newest of everything; TORCH=2.11 for another release
NEWEST := .venv-newest
$(NEWEST)/installed: pyproject.toml
	$(PYTHON) -m venv $(NEWEST)
	$(NEWEST)/bin/python -m pip install --quiet --disable-pip-version-check --upgrade \
		'torch$(if $(TORCH),==$(TORCH).*)' --editable '.[test]'
	@touch $@

test-newest: $(NEWEST)/installed
	OMP_WAIT_POLICY=PASSIVE $(NEWEST)/bin/python -m pytest --numprocesses 2 --dist worksteal $(TESTS)

FRAMEWORKS := .venv-frameworks
$(FRAMEWORKS)/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check \
		$(shell grep '^torch==' constraints.txt) --editable '.[frameworks]'
	$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check \
		--no-deps --target $(FRAMEWORKS)/torchtune torchao==0.15.0
	@touch $@

# torchtune needs an older torchao than peft takes, so it is tested in a process of its own
test-frameworks: $(FRAMEWORKS)/installed
	$(FRAMEWORKS)/bin/python -m pytest tests/frameworks
	PYTHONPATH=$(CURDIR)/$(FRAMEWORKS)/torchtune $(FRAMEWORKS)/bin/python -m pytest tests/frameworks/test_torchtune.py

SEED := 0
SECONDS := 300
fuzz: $(VENV)/installed-test
	cd tests && OMP_WAIT_POLICY=PASSIVE ../$(BIN)/python fuzz.py --seed $(SEED) --seconds $(SECONDS)

# Both runtimes come first in the process, as Python itself is built without them; what torch and Python
# keep at the end is no leak of a kernel's.
SANITIZED_CXX ?= c++
RUNTIMES = $(foreach name,libasan.so libubsan.so,$(shell $(SANITIZED_CXX) -print-file-name=$(name)))
test-asan: $(VENV)/installed-test
	SANITIZED_CXX=$(SANITIZED_CXX) CXX=$(CURDIR)/tests/sanitized-cxx HEAVYBALL_CACHE=$(CURDIR)/build/asan \
		LD_PRELOAD="$(RUNTIMES)" ASAN_OPTIONS=detect_leaks=0:detect_odr_violation=0 \
		OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest --numprocesses 2 --dist loadfile \
		tests/test_addresses.py tests/test_compiler.py tests/test_axes.py tests/test_staging.py \
		tests/test_waves.py tests/test_fused.py tests/test_storage.py tests/test_sums.py

bench: $(VENV)/installed-race
	$(BIN)/python -m benchmarks --threads 2 --out docs/measurements.md

psgd-efficiency: $(VENV)/installed-race
	$(BIN)/python -m benchmarks.psgd --threads 2 --out docs/psgd_efficiency.md

PEERS := .venv-peers
$(PEERS)/installed: benchmarks/peers.txt constraints.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint constraints.txt --requirement benchmarks/peers.txt
	@touch $@

bench-peers: $(VENV)/installed-race $(PEERS)/installed
	$(BIN)/python -m benchmarks --peers --threads 2 --out docs/measurements.md

bench-duels: $(VENV)/installed-race $(PEERS)/installed
	$(BIN)/python -m benchmarks --duel all --threads 2 --out docs/measurements.md

# DATA=DIR for a folder that holds the files; heavyball race --resume comparison/chars goes on with it
COMPARE = $(BIN)/heavyball race $(if $(DATA),--data $(DATA)) --seeds 3 --grid-seeds 1 --target AdamW --threads 1
comparison: comparison-chars comparison-mnist

comparison-chars: GRID := lr=(0.001,0.003,0.01,0.03)
comparison-chars: WIDE := lr=(0.0003,0.001,0.003,0.01,0.03)
comparison-chars: $(VENV)/installed-race
	$(COMPARE) --task chars --steps 500 --eval-every 25 --out comparison/chars \
		-o 'AdamW:$(GRID)' -o 'SOAP:$(GRID)' -o 'PrecondSchedulePaLMSOAP:$(GRID)' -o 'PSGDKron:$(WIDE)' \
		-o 'DelayedPSGD:$(WIDE)' -o 'Muon:lr=(0.005,0.01,0.02,0.04),adamw_lr=0.003'

comparison-mnist: GRID := lr=(0.001,0.003,0.01)
comparison-mnist: WIDE := lr=(0.0003,0.001,0.003,0.01)
comparison-mnist: $(VENV)/installed-race
	$(COMPARE) --task mnist --steps 240 --eval-every 30 --out comparison/mnist \
		-o 'AdamW:$(GRID)' -o 'SOAP:$(GRID)' -o 'PrecondSchedulePaLMSOAP:$(GRID)' -o 'PSGDKron:$(WIDE)' \
		-o 'DelayedPSGD:$(WIDE)' -o 'Muon:lr=(0.0025,0.005,0.01,0.02,0.04),adamw_lr=0.003'

lint: $(VENV)/installed-lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/installed-race
	$(BIN)/python docs/build.py

clean:
	rm -rf $(VENV) $(PEERS) $(FRAMEWORKS) $(NEWEST) demo comparison build *.egg-info
