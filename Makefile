# make test      set up .venv, then run the whole suite
# make profile   set up .venv, then measure which backend is fastest on this machine, store it, and show the winners
# make benchmark set up .venv, then time this library beside the idioms that people use today, for up to an hour
# make check     format, lint and types, as CI does
# make format    mend what can be mended by itself

PYTHON ?= python3
BIN := .venv/bin
# Without the constraints, pip would take the newest torch, which is larger and not the one that was tested.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: test profile benchmark check format clean

# Threads that spin while they wait make torch several times slower wherever something else uses the cores as well.
test: export OMP_WAIT_POLICY := PASSIVE
test: .venv/.installed-flash-attn
	$(BIN)/python -m pytest

profile: .venv/.installed-flash-attn
	$(BIN)/compiled-logprobs profile

benchmark: .venv/.installed-flash-attn
	$(BIN)/python -m benchmarks.peers --json build/benchmarks/peers.json --html build/benchmarks/peers.html

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find benchmarks compiled_logprobs tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[test]'
	touch $@

# flash-attn's Triton kernels are plain Python: its CUDA extension, which takes long to build, is left out. Its setup.py
# imports torch, hence no build isolation; it depends on einops, which these kernels do not use.
.venv/.installed-flash-attn: .venv/.installed
	FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE \
		$(INSTALL) --no-build-isolation --no-deps flash-attn
	touch $@
