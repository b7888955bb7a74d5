# Every target sets itself up first. Variables: ENV, AGENT, SEED, SET, ROOT, RUN, DEPTH, BUDGET, DATA_DIR, PROMPTS,
# TEMPERATURE, COUNT, PROMPT, HOST, KIND, ARGS.
PYTHON ?= python3
PY := .venv/bin/python
READY := .venv/ready

ENV ?= SpecDepth-v0
AGENT ?=
SEED ?= 0
SET ?=
ROOT ?= runs
TEMPERATURE ?=
RUN ?=
DEPTH ?=
BUDGET ?=
DATA_DIR ?=
PROMPTS ?=
PROMPT ?= Explain in three sentences why the sky is blue.
# As it was written, dollar signs and all.
override PROMPT := $(value PROMPT)
export PROMPT
COUNT ?=
# Not the environment's, where some shells and compilers have one.
HOST = localhost
KIND ?= eagle3
ARGS ?=

.PHONY: help setup train eval bench bench-k bench-dvi benchmark minari drafter standalone tune generate trace cloud edge edge-cloud cloud-load \
	tensorboard test fuzz lint

help:  ## list the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/^([a-z-]+):[^#]*## ?/\1\t/' | expand -t 14

$(READY): setup.cfg constraints.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet -c constraints.txt -e '.[test,dev]'
	$(PY) -m pip install --quiet -c constraints.txt --no-deps speculators hs-connectors  # asks for an older transformers
	@touch $(READY)

setup: $(READY)  ## make .venv with the pinned versions

train: $(READY)  ## train AGENT (default: the file's first) on ENV from experiments/ENV.yml; SET="key=value …" overrides; then the table
	$(PY) -m experiments.train $(ENV) $(if $(AGENT),--agent $(AGENT)) --seed $(SEED) --root $(ROOT) --set $(SET)

eval: $(READY)  ## the table of RUN again, or of every mix of DEPTH and BUDGET (numbers or runs)
	$(PY) -m experiments.evaluate $(RUN) --depth "$(DEPTH)" --budget "$(BUDGET)" \
		$(if $(DATA_DIR),--data-dir $(DATA_DIR)) $(if $(PROMPTS),--prompts $(PROMPTS)) \
		$(if $(COUNT),--count $(COUNT)) $(if $(TEMPERATURE),--temperature $(TEMPERATURE)) $(ARGS)

bench: $(READY)  ## speed of plain and static decoding against transformers and llama.cpp, cost curves; runs/bench.json
	$(PY) -m experiments.bench $(ARGS)

bench-k: $(READY)  ## fixed draft lengths, controllers and trained agents by context; runs/bench-k.json; ARGS=--help
	$(PY) -m experiments.bench_k $(ARGS)

bench-dvi: $(READY)  ## learning curves of agents that improve an early exit; runs/bench-dvi/bench-dvi.md, .json, .png; ARGS=--help
	$(PY) -m experiments.bench_dvi $(ARGS)

drafter: $(READY)  ## train a drafter for a target, KIND=eagle3 or draft-model; ARGS="--target …", ARGS=--help
	$(PY) -m experiments.drafter --kind $(KIND) $(ARGS)

standalone: $(READY)  ## write the draft model DRAFTER with its target's embedding to OUT, for transformers; TARGET=name of another target
	$(PY) -m experiments.standalone $(DRAFTER) $(OUT) $(if $(TARGET),--target $(TARGET))

tune: $(READY)  ## tune AGENT, a published controller of ENV (SpecK-v0), on training prompts; ARGS=--help
	$(PY) -m experiments.tune $(if $(filter file,$(origin ENV)),SpecK-v0,$(ENV)) $(if $(AGENT),--agent $(AGENT)) --set $(SET) $(ARGS)

generate: $(READY)  ## stream an answer to PROMPT under the policy of RUN
	$(PY) -m experiments.stream "$$PROMPT" $(if $(RUN),--run $(RUN)) $(ARGS)

trace: $(READY)  ## record a trace that ENV replays exactly (for SpecTopK-v0 an expected-acceptance one); ARGS=--help
	$(PY) -m $(if $(filter SpecTopK-v0,$(ENV)),experiments.topk_trace,experiments.trace $(ENV)) $(ARGS)

benchmark: $(READY)  ## where adaptive control pays: RESULTS.md, runs/benchmark.json; FAST=1 a small version, RAY=1 on Ray; ARGS=--help
	$(PY) -m experiments.benchmark $(ARGS)

minari: $(READY)  ## write episodes of a trace as a Minari data set; ARGS="runs/traces/NAME --name spec-envs/depth-random-v0"
	$(PY) -m experiments.minari_export $(ARGS)

cloud: $(READY)  ## serve a target that verifies what edges draft, on port 8765; ARGS=--help
	$(PY) -m spec_envs.network.cloud $(ARGS)

edge: $(READY)  ## stream an answer to PROMPT, drafted here and verified by the cloud at HOST (or URL); ARGS=--help
	$(PY) -m spec_envs.network.edge $(HOST) --prompt "$$PROMPT" $(ARGS)

edge-cloud: $(READY)  ## edge and cloud against the cloud alone, through a real socket; ARGS="--num-prompts 5 --iterations 2"
	$(PY) -m experiments.edge_cloud $(ARGS)

cloud-load: $(READY)  ## a cloud under 1, 4 and 16 edges, with and without batching; runs/cloud-load.json; ARGS=--help
	$(PY) -m experiments.cloud_load $(ARGS)

tensorboard: $(READY)  ## look into the runs
	$(PY) -m tensorboard.main --logdir $(ROOT)

test: $(READY)  ## run the tests, side by side on one thread each (ARGS="-n 0 -k name": one after another)
	OMP_NUM_THREADS=1 $(PY) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile $(ARGS)

fuzz: $(READY)  ## look for new failures with generated input, many examples a test; ARGS="-k name"
	OMP_NUM_THREADS=1 $(PY) -m pytest -m fuzz --hypothesis-profile fuzz --numprocesses auto $(ARGS)

lint: $(READY)  ## format check, lint, types
	$(PY) -m ruff format --check .
	$(PY) -m ruff check .
	$(PY) -m mypy
