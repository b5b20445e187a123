# make quick     set up .venv, then run the tests that start no process, no browser and no long compilation
# make slow      set up .venv, then run the other tests, those for a GPU among them
# make test      both
# make test-torch VERSION=2.8.0 [SLOW=no]  the tests, without browser, with another torch, in an environment of its own
# make test-integrations  train with TRL's own trainers, patched and not, in an environment of its own
# make profile   set up .venv, then measure which backend is fastest on this machine, store it, and show the winners
# make dashboard set up .venv, then show the profiles in a browser, until Ctrl-C
# make example   set up .venv, then train a small language model with right and with wrong log-probabilities
# make benchmark set up .venv, then time this library beside the idioms that people use today, for up to an hour
# make inspect   set up .venv, then count what the code generated for a GPU does, without one
# make gpu       on a machine with a GPU, all that it has to show, in under eight minutes; PYTHON=python takes yours
# make check     format, lint and types, as CI does
# make format    mend what can be mended by itself

PYTHON ?= python3
BIN := .venv/bin
TORCH := .venv-torch-$(VERSION)
INTEGRATIONS := .venv-integrations
# Together eleven minutes; each run takes a minute or two. In the foreground, so that Ctrl-C ends them as well.
INTEGRATIONS_LIMIT := 5m
INTEGRATIONS_LIMIT_1.13 := 3m
INTEGRATIONS_LIMIT_1.16 := 3m
define within
timeout --foreground $(1) $(2) || { code=$$?; [ $$code -ne 124 ] || \
	echo "The integration tests took longer than $(1): see above which one it was at, and make it smaller." >&2; exit $$code; }
endef
# Without the constraints, pip would take the newest torch, which is larger and not the one that was tested.
INSTALL := $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

.PHONY: setup quick slow test test-torch test-integrations profile dashboard example benchmark inspect gpu check format clean

setup: .venv/.installed-flash-attn

# A process for each of two cores, with a thread each: threads that share a core, and that spin while they wait, make torch
# several times slower. The tests of a file stay together, since they share what they compiled and the servers they started.
quick slow test-torch: export OMP_WAIT_POLICY := PASSIVE
quick slow test-torch: export OMP_NUM_THREADS := 1
quick: .venv/.installed-flash-attn
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not browser and not gpu"

slow: .venv/.installed-flash-attn
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "slow or browser" --durations 25

test: quick slow

test-torch: $(TORCH)/.installed
	$(TORCH)/bin/python -m pytest -n 2 --dist loadfile -m "not browser and not gpu$(if $(filter no,$(SLOW)), and not slow)"

test-integrations: export OMP_WAIT_POLICY := PASSIVE
test-integrations: $(INTEGRATIONS)/.installed
	$(call within,$(INTEGRATIONS_LIMIT),$(INTEGRATIONS)/bin/python -m pytest -v tests/integrations)
	PYTHONPATH=$(INTEGRATIONS)/trl-1.13.0 \
	$(call within,$(INTEGRATIONS_LIMIT_1.13),$(INTEGRATIONS)/bin/python -m pytest -v tests/integrations/test_trl.py)
	PYTHONPATH=$(INTEGRATIONS)/trl-1.16.0 \
	$(call within,$(INTEGRATIONS_LIMIT_1.16),$(INTEGRATIONS)/bin/python -m pytest -v tests/integrations/test_trl.py -k "not bfloat16")

profile: .venv/.installed-flash-attn
	$(BIN)/compiled-logprobs profile --budget 30
	$(BIN)/compiled-logprobs profile --preset rl --rows 64

dashboard: .venv/.installed-flash-attn
	$(BIN)/compiled-logprobs dashboard

example: .venv/.installed
	$(BIN)/python -m examples.reinforce

benchmark: .venv/.installed-flash-attn
	$(BIN)/python -m benchmarks.peers --json build/benchmarks/peers.json --html build/benchmarks/peers.html

inspect: .venv/.installed-flash-attn
	$(BIN)/python -m tests.gpu_code --arch sm_90 --rows 8192 --vocab 151936 --dtype bfloat16 --grad

# Sets nothing up: whoever has a GPU has a torch for it, in an environment that is to be measured as it is.
gpu:
	$(PYTHON) -m benchmarks.gpu

check: .venv/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: .venv/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf .venv .venv-integrations .venv-torch-* build dist .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find benchmarks compiled_logprobs dashboard examples tests -name __pycache__ -prune -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv .venv

.venv/.installed: pyproject.toml constraints.txt | $(BIN)/python
	$(INSTALL) -e '.[test]'
	touch $@

# flash-attn's Triton kernels are plain Python: its CUDA extension, which takes long to build, is left out. Its setup.py
# imports torch, hence no build isolation; it depends on einops, which these kernels do not use.
FLASH_ATTENTION := --no-build-isolation --no-deps flash-attn
.venv/.installed-flash-attn $(TORCH)/.installed: export FLASH_ATTENTION_FORCE_BUILD := TRUE
.venv/.installed-flash-attn $(TORCH)/.installed: export FLASH_ATTENTION_SKIP_CUDA_BUILD := TRUE
.venv/.installed-flash-attn: .venv/.installed
	$(INSTALL) $(FLASH_ATTENTION)
	touch $@

# Each release of torch pins the triton that it needs where it is built for CUDA, as PyPI's are. torch 2.11 refuses a new
# setuptools, and the interpreter of triton 3.6 and older cannot take numpy 2.4. They take some 6 GB each.
$(TORCH)/.installed: pyproject.toml constraints.txt
	test -n "$(VERSION)" || { echo "Say which torch, e.g. make test-torch VERSION=2.8.0" >&2; exit 1; }
	$(PYTHON) -m venv $(TORCH)
	{ echo "numpy<2.4"; grep -vE '^(numpy|setuptools|torch|triton)==' constraints.txt; } > $(TORCH)/constraints.txt
	$(TORCH)/bin/python -m pip install --disable-pip-version-check -c $(TORCH)/constraints.txt torch==$(VERSION) wheel -e '.[test]'
	$(TORCH)/bin/python -m pip install --disable-pip-version-check -c $(TORCH)/constraints.txt $(FLASH_ATTENTION)
	touch $@

# TRL 1.14, the last version whose trainers compute from logits, and the versions around it, without their
# dependencies, each in a folder of its own.
$(INTEGRATIONS)/.installed: pyproject.toml tests/integrations/constraints.txt
	$(PYTHON) -m venv $(INTEGRATIONS)
	$(INTEGRATIONS)/bin/python -m pip install --disable-pip-version-check -c tests/integrations/constraints.txt -e . pytest requests trl
	for version in 1.13.0 1.15.0 1.16.0; do \
		$(INTEGRATIONS)/bin/python -m pip install --disable-pip-version-check --no-deps --upgrade \
			--target $(INTEGRATIONS)/trl-$$version trl==$$version || exit 1; \
	done
	touch $@
