# Every target sets itself up first, and takes the variables that `make help` names with it, as they are written: one value
# each, but for SET (words without spaces in them) and ARGS (words of the shell, which takes their quotes off).
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/ready
GIVEN := $(foreach v,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $v))),$v))

ENV ?= SpecDepth-v0
SEED ?= 0
ROOT ?= runs
PROMPT ?= Explain in three sentences why the sky is blue.
# Not the environment's, where some shells and compilers have one.
HOST = localhost
KIND ?= eagle3
# What `make tune` tunes where no ENV is given.
TUNED := $(if $(filter file,$(origin ENV)),SpecK-v0)

READS_train = ENV AGENT SEED SET ROOT ARGS
READS_eval = RUN DEPTH BUDGET DATA_DIR PROMPTS COUNT TEMPERATURE ARGS
READS_drafter = KIND ARGS
READS_tune = ENV AGENT SET ARGS
READS_generate = PROMPT RUN ARGS
READS_trace = ENV ARGS
READS_benchmark = FAST RAY ARGS
READS_edge = HOST PROMPT ARGS
READS_tensorboard = ROOT
$(foreach t,compare-decoding compare-chains compare-exits bench bench-k bench-dvi standalone minari cloud edge-cloud cloud-load zoo-check chaos test fuzz,$(eval READS_$t = ARGS))

GOALS := $(or $(MAKECMDGOALS),help)
READ := $(foreach t,$(GOALS),$(READS_$t))
ifneq ($(filter-out $(READ) PYTHON PY READY,$(GIVEN)),)
$(error make $(GOALS) does not read $(filter-out $(READ) PYTHON PY READY,$(GIVEN)); it reads $(or $(strip $(READ)),no variables))
endif
# Values reach the commands through the environment, dollar signs, quotes and all; make's own export would expand them.
unexport $(GIVEN)
$(foreach v,$(READ),$(eval export GIVEN_$v := $$(value $v)))

.PHONY: help setup train eval compare-decoding compare-chains compare-exits benchmark minari drafter standalone tune generate trace \
	cloud edge edge-cloud cloud-load tensorboard test fuzz zoo-check chaos lint

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*## ?/\1\t/' | expand -t 18

$(READY): setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -c constraints.txt -e '.[test,dev]'
	$(PY) -m pip install --quiet -c constraints.txt --no-deps speculators hs-connectors  # asks for an older transformers
	@touch $(READY)

setup: $(READY)  ## make .venv with the pinned versions

train: $(READY)  ## train AGENT (default: the file's first) on ENV from experiments/ENV.yml; SET="key=value …" overrides; SEED, ROOT; then the table
	set -f; $(PY) -m spec_envs.experiments.train "$$GIVEN_ENV" $${GIVEN_AGENT:+--agent "$$GIVEN_AGENT"} --seed "$$GIVEN_SEED" \
		--root "$$GIVEN_ROOT" --set $$GIVEN_SET $(value ARGS)

eval: $(READY)  ## the table of RUN again, or of every mix of DEPTH and BUDGET (numbers or runs); DATA_DIR, PROMPTS, COUNT, TEMPERATURE
	$(PY) -m spec_envs.experiments.evaluate $${GIVEN_RUN:+"$$GIVEN_RUN"} --depth "$$GIVEN_DEPTH" --budget "$$GIVEN_BUDGET" \
		$${GIVEN_DATA_DIR:+--data-dir "$$GIVEN_DATA_DIR"} $${GIVEN_PROMPTS:+--prompts "$$GIVEN_PROMPTS"} \
		$${GIVEN_COUNT:+--count "$$GIVEN_COUNT"} $${GIVEN_TEMPERATURE:+--temperature "$$GIVEN_TEMPERATURE"} $(value ARGS)

compare-decoding: $(READY)  ## speed of plain and static decoding against transformers and llama.cpp, cost curves; runs/bench.json
	$(PY) -m spec_envs.experiments.comparisons.decoding $(value ARGS)

compare-chains: $(READY)  ## fixed draft lengths, controllers and trained agents by context; runs/bench-k.json; ARGS=--help
	$(PY) -m spec_envs.experiments.comparisons.chains $(value ARGS)

compare-exits: $(READY)  ## learning curves of agents that improve an early exit; runs/bench-dvi/bench-dvi.md, .json, .png; ARGS=--help
	$(PY) -m spec_envs.experiments.comparisons.exits $(value ARGS)

drafter: $(READY)  ## train a drafter for a target, KIND=eagle3 or draft-model; ARGS="--target …", ARGS=--help
	$(PY) -m spec_envs.experiments.drafters --kind "$$GIVEN_KIND" $(value ARGS)

standalone: $(READY)  ## write a draft model with its target's embedding, for transformers; ARGS="smollm2-135m-draft --out FOLDER"
	$(PY) -m spec_envs.experiments.drafters.standalone $(value ARGS)

tune: $(READY)  ## tune AGENT, a published controller of ENV (SpecK-v0), on training prompts; SET; ARGS=--help
	set -f; $(PY) -m spec_envs.experiments.tune "$(or $(TUNED),$$GIVEN_ENV)" $${GIVEN_AGENT:+--agent "$$GIVEN_AGENT"} --set $$GIVEN_SET $(value ARGS)

generate: $(READY)  ## stream an answer to PROMPT under the policy of RUN
	$(PY) -m spec_envs.experiments.stream "$$GIVEN_PROMPT" $${GIVEN_RUN:+--run "$$GIVEN_RUN"} $(value ARGS)

trace: $(READY)  ## record a trace that ENV replays exactly (for SpecTopK-v0 an expected-acceptance one); ARGS=--help
	$(PY) -m $(if $(filter SpecTopK-v0,$(value ENV)),spec_envs.experiments.traces.record_expected,spec_envs.experiments.traces.record "$$GIVEN_ENV") $(value ARGS)

benchmark: $(READY)  ## where adaptive control pays: RESULTS.md, runs/benchmark.json; FAST=1 a small version, RAY=1 on Ray; ARGS=--help
	$(PY) -m spec_envs.experiments.benchmark $(value ARGS)

minari: $(READY)  ## write episodes of a trace as a Minari data set; ARGS="runs/traces/NAME --name spec-envs/depth-random-v0"
	$(PY) -m spec_envs.experiments.traces.minari $(value ARGS)

cloud: $(READY)  ## serve a target that verifies what edges draft, on port 8765; ARGS=--help
	$(PY) -m spec_envs.network.cloud $(value ARGS)

edge: $(READY)  ## stream an answer to PROMPT, drafted here and verified by the cloud at HOST (or URL); ARGS=--help
	$(PY) -m spec_envs.network.edge "$$GIVEN_HOST" --prompt "$$GIVEN_PROMPT" $(value ARGS)

edge-cloud: $(READY)  ## edge and cloud against the cloud alone, through a real socket; ARGS="--num-prompts 5 --iterations 2"
	$(PY) -m spec_envs.experiments.network.edge_cloud $(value ARGS)

cloud-load: $(READY)  ## a cloud under 1, 4 and 16 edges, with and without batching; runs/cloud-load.json; ARGS=--help
	$(PY) -m spec_envs.experiments.network.cloud_load $(value ARGS)

tensorboard: $(READY)  ## look into the runs below ROOT
	$(PY) -m tensorboard.main --logdir "$$GIVEN_ROOT"

test: $(READY)  ## run the tests, side by side on one thread each (ARGS="-n 0 -k name": one after another)
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(value ARGS)

fuzz: $(READY)  ## look for new failures with generated input, many examples a test; ARGS="-k name"
	OMP_NUM_THREADS=1 $(PY) -m pytest -m fuzz --hypothesis-profile fuzz --numprocesses auto $(value ARGS)

zoo-check: $(READY)  ## train every stanza of every YAML in small, to its table, and play every shipped agent; ARGS="--sample 4"
	$(PY) -m spec_envs.experiments.checks.zoo $(value ARGS)

chaos: $(READY)  ## kill every command that continues at random moments, and continue it; ARGS="--cases tune --kills 3"
	$(PY) -m spec_envs.experiments.checks.chaos $(value ARGS)

lint: $(READY)  ## format check, lint, types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy

# Former names of targets.
.PHONY: bench bench-k bench-dvi
bench: compare-decoding
bench-k: compare-chains
bench-dvi: compare-exits
$(foreach t,$(filter bench,$(GOALS)),$(warning make $t is now called make compare-decoding))
$(foreach t,$(filter bench-k,$(GOALS)),$(warning make $t is now called make compare-chains))
$(foreach t,$(filter bench-dvi,$(GOALS)),$(warning make $t is now called make compare-exits))
