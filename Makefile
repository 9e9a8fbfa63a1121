# CHASM. `make help` lists the targets; every step is skipped when its output is current.
SHELL := /bin/bash
, := ,
.DEFAULT_GOAL := help

VENV    ?= .venv
PYTHON  ?= python3
BIN     := $(VENV)/bin
CHASM   := $(BIN)/chasm
READY   := $(VENV)/.ready
UV      := $(shell command -v uv 2>/dev/null)

SUBJ    ?= 1
NSD     ?=
ARGS    ?=
SCALE   := $(if $(NSD),experiments/nsd,experiments)
DATASET ?= $(if $(NSD),$(notdir $(patsubst %/,%,$(NSD))),simulated)
ORIGIN   = $(if $(NSD),--nsd $(NSD),--simulate)
MACAQUE ?= ../shared/data/macaque_v4

# A new subject, and those whose model it starts from: numbers, or the folder of a run.
NEW      = $(if $(filter file,$(origin SUBJ)),7,$(SUBJ))
SOURCE  ?= 1,2
FROM     = $(if $(findstring /,$(SOURCE)),--source $(SOURCE),--subjects [$(SOURCE)])
TRANSFER = -c $(or $(RECIPE),$(SCALE)/adapt.yaml) $(ORIGIN) --data.dataset_dir data/$(DATASET)
ARM     ?=
N       ?=

TRIALS  ?= 20
WORKERS ?= 2
STORAGE ?=

STAGE   ?= 1
CKPT    ?=
SUITES  ?= cls patches swap gate layers inputs$(if $(filter 2,$(STAGE)), routes latent decoders)
JOBS    ?=
ABLATE   = $(BIN)/python -m ablations.run
TRAINED  = $(if $(CKPT),--run $(CKPT),-c $(or $(RECIPE),$(SCALE)/stage$(STAGE).yaml) $(ORIGIN) --data.subject $(SUBJ) --data.dataset_dir data/$(DATASET))

.PHONY: help setup stage1 stage2 joint-subjects adapt fewshot transfer-table sweep baselines macaque macaque-baselines ablate-cls ablate-patches ablate-swap ablate ablate-retrain calibrate test test-all lint format bench bench-gpu clean

help: ## List the targets
	@grep -hE '^[a-z0-9-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z0-9-]+):[^#]*## /\1\t/' | \
	  awk -F'\t' '{ printf "  make %-17s %s\n", $$1, $$2 }'
	@echo
	@echo "  SUBJ=1      subject              NSD=/path   a real NSD tree (default: a simulated one)"
	@echo "  SOURCE=1,2  for adapt and fewshot (or a run's folder)    N=100  ARM=ridge_head|head|lora|full"
	@echo "  STAGE=2     for ablate-*, sweep        CKPT=...  runs for ablate-*, instead of the recipe's own"
	@echo "  RECIPE=...  another recipe       ARGS=\"--trainer.max_epochs 3\"   any recipe key"

$(READY): pyproject.toml
ifneq ($(UV),)
	@test -x $(BIN)/python || $(UV) venv --quiet --python $(PYTHON) $(VENV)
	$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python -e '.[dev]'
else
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --progress-bar off -e '.[dev]'
endif
	@touch $@

setup: $(READY) ## Make the environment in .venv (every target does so when needed)

stage1: $(READY) ## Train and score Stage 1 on subject SUBJ; prints the table and the report's path
	$(CHASM) run -c $(or $(RECIPE),$(SCALE)/stage1.yaml) $(ORIGIN) --data.subject $(SUBJ) --data.dataset_dir data/$(DATASET) $(ARGS)

stage2: $(READY) ## Train and score Stage 2 on its Stage 1 (trained first where needed)
	$(CHASM) run -c $(or $(RECIPE),$(SCALE)/stage2.yaml) $(ORIGIN) --data.subject $(SUBJ) --data.dataset_dir data/$(DATASET) $(ARGS)

joint-subjects: $(READY) ## One backbone for several subjects, a head for each (SUBJ=1,2,5)
	$(CHASM) run -c $(or $(RECIPE),$(SCALE)/joint_subjects.yaml) $(ORIGIN) --subjects [$(if $(filter file,$(origin SUBJ)),1$(,)2$(,)5,$(SUBJ))] --data.dataset_dir data/$(DATASET) $(ARGS)

adapt: $(READY) ## A model of the subjects SOURCE for the new subject SUBJ (N images, ARM)
	$(CHASM) adapt $(TRANSFER) $(FROM) --data.subject $(NEW) $(if $(ARM),--arm $(ARM)) $(if $(N),--n $(N)) $(ARGS)

fewshot: $(READY) ## The same over the number of images: every arm, draws, intervals, figure
	$(CHASM) fewshot $(TRANSFER) $(FROM) --data.subject $(NEW) $(ARGS)

transfer-table: $(READY) ## The paper's transfer table, published values beside ours
	$(CHASM) transfer-table $(TRANSFER) $(ARGS)

sweep: $(READY) ## Search the settings of STAGE on validation (TRIALS, WORKERS, STORAGE=URL)
	$(CHASM) tune -c $(or $(RECIPE),experiments/sweeps/stage$(STAGE).yaml) $(ORIGIN) --trials $(TRIALS) --workers $(WORKERS) $(if $(STORAGE),--storage $(STORAGE)) --data.subject $(SUBJ) --data.dataset_dir data/$(DATASET) $(ARGS)

baselines: $(READY) ## Every model of the paper's comparison on subject SUBJ, in one table
	$(CHASM) baselines $(if $(NSD),--recipes experiments/paper) $(ORIGIN) --data.subject $(SUBJ) --data.dataset_dir data/$(DATASET) $(ARGS)

macaque: $(READY) ## The same on real macaque V4 recordings in MACAQUE (two sessions)
	$(CHASM) prepare arrays --dataset macaque_v4 --name 201025 \
	  --images $(MACAQUE)/images_201025.zip --responses $(MACAQUE)/responses_avg_201025.npy
	$(CHASM) prepare arrays --dataset macaque_v4 --name 210325 \
	  --images $(MACAQUE)/images_210325.zip --responses $(MACAQUE)/responses_raw_210325.npy
	$(CHASM) run -c experiments/macaque.yaml --data.subject 201025 $(ARGS)
	$(CHASM) run -c experiments/macaque.yaml --data.subject 210325 $(ARGS)

macaque-baselines: $(READY) ## The comparison on a session of the macaque recordings
	$(CHASM) prepare arrays --dataset macaque_v4 --name 210325 \
	  --images $(MACAQUE)/images_210325.zip --responses $(MACAQUE)/responses_raw_210325.npy
	$(CHASM) baselines --data.dataset_dir data/macaque_v4 --data.subject 210325 --data.parcels.size 1 $(ARGS)

ablate-cls: $(READY) ## What every ROI loses without the CLS stream (of STAGE, or of the run CKPT)
	$(ABLATE) cls $(TRAINED) $(ARGS)

ablate-patches: $(READY) ## The same without the patch stream
	$(ABLATE) patches $(TRAINED) $(ARGS)

ablate-swap: $(READY) ## The paper's swapped routes, with controls
	$(ABLATE) swap $(TRAINED) $(ARGS)

ablate: $(READY) ## All suites, or SUITES="cls gate"
	$(ABLATE) $(SUITES) $(TRAINED) $(ARGS)

ablate-retrain: $(READY) ## Models trained without one of their parts, in one table
	$(CHASM) baselines --recipes ablations/retrain $(ORIGIN) --data.subject $(SUBJ) --data.dataset_dir data/$(DATASET) --runs runs/retrain $(ARGS)

calibrate: $(READY) ## How often the suites are right, on simulated brains (resumable; about 1.5 core hours)
	$(BIN)/python -m ablations.calibrate $(if $(JOBS),--jobs $(JOBS)) $(ARGS)

test: $(READY) ## The default test suite, in two processes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-all: $(READY) ## Also the tests marked slow
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m ''

lint: $(READY) ## ruff, mypy, import directions
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY) ## Format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## Speed and memory against named references; writes docs/benchmarks.md
	$(BIN)/python benchmarks/run.py $(ARGS)

bench-gpu: $(READY) ## The CUDA checks and timings, on a machine that has one; writes docs/benchmarks_gpu.md
	$(BIN)/python benchmarks/gpu.py $(ARGS)

clean: ## Remove caches (not data, not runs)
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache dist build
