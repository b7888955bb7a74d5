# Every target sets itself up first, and takes the variables that `make help` names with it, as they are written: one value
# each, but for SET (words without spaces in them) and ARGS (words of the shell, which takes their quotes off).
PYTHON ?= python3
PY := .venv/bin/python
SPEC_ENVS := .venv/bin/spec-envs
READY := .venv/ready
GIVEN := $(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v))

ENV ?= SpecDepth-v0
SEED ?= 0
ROOT ?= runs
PROMPT ?= Explain in three sentences why the sky is blue.
# Not the environment's, where some shells and compilers have one.
HOST = localhost
KIND ?= eagle3
# With a cost table in place of a clock, `make gifs` draws the same pictures on every machine.
PRICED := env.clock=smollm2-135m-int8-xeon-amx-2
# What `make tune` tunes where no ENV is given.
TUNED := $(if $(filter file,$(origin ENV)),SpecK-v0)

READS_train = ENV AGENT SEED SET ROOT ARGS
READS_eval = RUN DEPTH BUDGET DATA_DIR PROMPTS COUNT TEMPERATURE ARGS
READS_drafter = KIND ARGS
READS_tune = ENV AGENT SET ARGS
READS_generate = PROMPT RUN ARGS
READS_trace = ENV ARGS
READS_benchmark = FAST RAY ARGS
READS_results = ARGS
READS_edge = HOST PROMPT ARGS
READS_tensorboard = ROOT
$(foreach t,compare-decoding compare-chains compare-drafters compare-exits standalone minari cloud edge-cloud cloud-load zoo-check chaos test test-docs fuzz,$(eval READS_$t = ARGS))

GOALS := $(or $(MAKECMDGOALS),help)
READ := $(foreach t,$(GOALS),$(READS_$t))
ifneq ($(filter-out $(READ) PYTHON PY SPEC_ENVS READY,$(GIVEN)),)
$(error make $(GOALS) does not read $(filter-out $(READ) PYTHON PY SPEC_ENVS READY,$(GIVEN)); it reads $(or $(strip $(READ)),no variables))
endif
# Values reach the commands through the environment, dollar signs, quotes and all; make's own export would expand them.
unexport $(GIVEN)
$(foreach v,$(READ),$(eval export GIVEN_$v := $$(value $v)))

.PHONY: help setup train eval compare-decoding compare-chains compare-drafters compare-exits benchmark results minari drafter standalone tune \
	generate trace cloud edge edge-cloud cloud-load tensorboard gifs docs docs-serve test test-docs fuzz zoo-check chaos lint

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*## ?/\1\t/' | expand -t 18

$(READY): setup.cfg constraints.txt
	@echo 'Installing PyTorch, transformers, Stable-Baselines3 and the tools for tests and documentation into .venv: about 2 GB'
	@echo '(more where PyTorch comes with CUDA), and only once.'
	$(PYTHON) -m venv .venv
	$(PY) -m pip install -c constraints.txt -e '.[test,dev,docs]'
	$(PY) -m pip install -c constraints.txt --no-deps speculators hs-connectors  # asks for an older transformers
	@touch $(READY)

setup: $(READY)  ## make .venv with the pinned versions

train: $(READY)  ## train AGENT (default: the file's first) on ENV from experiments/ENV.yml; SET="key=value …" overrides; SEED, ROOT; then the table
	set -f; $(SPEC_ENVS) train "$$GIVEN_ENV" $${GIVEN_AGENT:+--agent "$$GIVEN_AGENT"} --seed "$$GIVEN_SEED" \
		--root "$$GIVEN_ROOT" --set $$GIVEN_SET $(value ARGS)

eval: $(READY)  ## the table of RUN again, or of every mix of DEPTH and BUDGET (numbers or runs); DATA_DIR, PROMPTS, COUNT, TEMPERATURE
	$(SPEC_ENVS) eval $${GIVEN_RUN:+"$$GIVEN_RUN"} --depth "$$GIVEN_DEPTH" --budget "$$GIVEN_BUDGET" \
		$${GIVEN_DATA_DIR:+--data-dir "$$GIVEN_DATA_DIR"} $${GIVEN_PROMPTS:+--prompts "$$GIVEN_PROMPTS"} \
		$${GIVEN_COUNT:+--count "$$GIVEN_COUNT"} $${GIVEN_TEMPERATURE:+--temperature "$$GIVEN_TEMPERATURE"} $(value ARGS)

compare-decoding: $(READY)  ## speed of plain and static decoding against transformers and llama.cpp, cost curves; decoding.md; ARGS=--help
	$(SPEC_ENVS) bench decoding $(value ARGS)

compare-chains: $(READY)  ## fixed draft lengths, controllers and trained agents by context; chains.md; ARGS=--help
	$(SPEC_ENVS) bench chains $(value ARGS)

compare-drafters: $(READY)  ## drafters side by side, each at its best static setting; drafters.md; ARGS="--drafters NAME …", ARGS=--help
	$(SPEC_ENVS) bench drafters $(value ARGS)

compare-exits: $(READY)  ## learning curves of agents that train an early exit; exits.md; ARGS=--help
	$(SPEC_ENVS) bench exits $(value ARGS)

drafter: $(READY)  ## train a drafter for a target, KIND=eagle3, parallel or draft-model; ARGS="--target …", ARGS=--help
	$(SPEC_ENVS) drafter --kind "$$GIVEN_KIND" $(value ARGS)

standalone: $(READY)  ## write a draft model with its target's embedding, for transformers; ARGS="smollm2-135m-draft --out FOLDER"
	$(SPEC_ENVS) standalone $(value ARGS)

tune: $(READY)  ## tune AGENT of ENV (SpecK-v0), a rule on training prompts or a trained agent on recorded texts; SET; ARGS=--help
	set -f; $(SPEC_ENVS) tune "$(or $(TUNED),$$GIVEN_ENV)" $${GIVEN_AGENT:+--agent "$$GIVEN_AGENT"} --set $$GIVEN_SET $(value ARGS)

generate: $(READY)  ## stream an answer to PROMPT under the policy of RUN
	$(SPEC_ENVS) generate "$$GIVEN_PROMPT" $${GIVEN_RUN:+--run "$$GIVEN_RUN"} $(value ARGS)

trace: $(READY)  ## record a trace that ENV replays exactly (for SpecTopK-v0 an expected-acceptance one); ARGS=--help
	$(SPEC_ENVS) trace "$$GIVEN_ENV" $(value ARGS)

benchmark: $(READY)  ## where adaptive control pays; adaptive-control.md; FAST=1 a small version, RAY=1 on Ray; ARGS=--help
	$(SPEC_ENVS) bench adaptive $(value ARGS)

results: $(READY)  ## the published results of this revision, on the final prompts; RESULTS.md, adaptive-control.md; ARGS="--ltd-seeds 0"
	$(SPEC_ENVS) results $(value ARGS)

minari: $(READY)  ## write episodes of a trace as a Minari data set; ARGS="runs/traces/NAME --name spec-envs/depth-random-v0"
	$(SPEC_ENVS) minari $(value ARGS)

cloud: $(READY)  ## serve a target that verifies what edges draft, on port 8765; ARGS=--help
	$(SPEC_ENVS) cloud $(value ARGS)

edge: $(READY)  ## stream an answer to PROMPT, drafted here and verified by the cloud at HOST (or URL); ARGS=--help
	$(SPEC_ENVS) edge "$$GIVEN_HOST" --prompt "$$GIVEN_PROMPT" $(value ARGS)

edge-cloud: $(READY)  ## edge and cloud against the cloud alone, through a real socket; edge-cloud.md; ARGS="--num-prompts 5 --iterations 2"
	$(SPEC_ENVS) bench edge-cloud $(value ARGS)

cloud-load: $(READY)  ## a cloud under 1, 4 and 16 edges, with and without batching; cloud-load.md; ARGS=--help
	$(SPEC_ENVS) bench cloud-load $(value ARGS)

tensorboard: $(READY)  ## look into the runs below ROOT
	$(PY) -m tensorboard.main --logdir "$$GIVEN_ROOT"

gifs: $(READY)  ## make the animated pictures of the documentation again, docs/assets/tree.gif and environments/*.gif
	for env in SpecDepth-v0 SpecBudget-v0 SpecTree-v0 SpecK-v0; do \
		$(SPEC_ENVS) video $$env --set $(PRICED) --out docs/assets/environments/$$env.gif || exit 1; \
	done
	$(SPEC_ENVS) video SpecDrafter-v0 --agent hedge --set $(PRICED) --out docs/assets/environments/SpecDrafter-v0.gif
	$(SPEC_ENVS) video SpecTopK-v0 --out docs/assets/environments/SpecTopK-v0.gif
	$(SPEC_ENVS) video SpecDVI-v0 --set $(PRICED) env.exit_layer=24 env.block=4 --max-new-tokens 16 \
		--out docs/assets/environments/SpecDVI-v0.gif
	$(SPEC_ENVS) video SpecTree-v0 --set $(PRICED) --prompt 'Write a Python function that returns the sum of two numbers.' \
		--out docs/assets/tree.gif

docs: $(READY)  ## build the documentation, docs/_build/index.html; a warning, such as of a broken link, is an error
	$(PY) -m sphinx -W --keep-going -q docs docs/_build

docs-serve: $(READY)  ## show the documentation at http://127.0.0.1:8000, and build it again whenever a page changes
	$(PY) -m sphinx_autobuild docs docs/_build

# A test that takes ten minutes hangs: the run ends there and prints where.
test: $(READY)  ## run the tests, side by side on one thread each (ARGS="-n 0 -k name": one after another)
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile \
		-o faulthandler_timeout=600 -o faulthandler_exit_on_timeout=true --max-worker-restart 0 $(value ARGS)

test-docs: $(READY)  ## run the examples of README.md and docs/; ARGS="-m long" those that take long
	OMP_NUM_THREADS=1 $(PY) -m pytest tests/docs $(value ARGS)

fuzz: $(READY)  ## look for new failures with generated input, many examples a test; ARGS="-k name"
	OMP_NUM_THREADS=1 $(PY) -m pytest -m fuzz --hypothesis-profile fuzz --numprocesses auto $(value ARGS)

zoo-check: $(READY)  ## train every stanza of every YAML in small, to its table, and play every shipped agent; ARGS="--sample 4"
	$(SPEC_ENVS) check zoo $(value ARGS)

chaos: $(READY)  ## kill every command that continues at random moments, and continue it; ARGS="--cases tune --kills 3"
	$(SPEC_ENVS) check chaos $(value ARGS)

lint: $(READY)  ## format check, lint, types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
