# `make help` lists the targets. Everything runs in .venv, which the first target makes and later ones reuse.
CONFIG ?= configs/run_bnb.yaml
STYLE ?= Answer concisely in 2 lines. No markdown. If unsure, say 'Not sure'.
# the base model in place of CONFIG's; demo: small or smollm2
MODEL ?=
TB_PORT ?= 6006
TB_LOGDIR ?= outputs
# the folder of raw, processed, processed_with_style and rendered
DATA ?= data
# a stage to train and evaluate on (processed, processed_with_style, rendered); else what CONFIG says, and processed
TRAIN_ON ?=
# the run folder that is evaluated, asked and merged
RUN ?= $(call of_config,output_dir,./output)
MERGED ?= $(RUN)/merged-bf16
INPUT ?= $(ROWS)/test.jsonl
OUTPUT ?= outputs/answers.jsonl
# more flags of finetune.py, such as FLAGS="--stage 2"
FLAGS ?=

VENV ?= .venv
PYTHON := $(VENV)/bin/python
LOCK := scripts/dev.lock
ROWS = $(DATA)/$(or $(TRAIN_ON),processed)
TRAIN = $(PYTHON) finetune.py --config=$(CONFIG) $(if $(MODEL),--base_model=$(MODEL)) \
	$(if $(TRAIN_ON),--data_path=$(ROWS)/train.jsonl --val_data_path=$(ROWS)/val.jsonl) $(FLAGS)
EVALUATE = $(PYTHON) scripts/evaluate.py --lora_weights=$(RUN)
INFER = $(PYTHON) scripts/infer.py --config=$(CONFIG) --lora_weights=$(RUN)
MERGE = $(PYTHON) scripts/merge.py --adapter=$(RUN)
HUB_MODEL = $(or $(MODEL),$(call of_config,base_model,))
of_config = $(shell $(PYTHON) -c "from surefoot import run_file; print(run_file.read('$(CONFIG)').get('$(1)', '$(2)'))")
quoted = '$(subst ','\'',$(1))'

.DEFAULT_GOAL := help
.PHONY: help install demo setup-dirs download-model process style render full-pipeline train train-bnb train-unsloth train-tb \
	train-bnb-tb train-unsloth-tb train-with-tb tensorboard tb tb-stop eval eval-val eval-test eval-quick eval-full infer infer-batch \
	infer-interactive merge merge-bf16 merge-test schema test test-slow lint check clean

help: ## list the targets
	@awk -F':.*## ' '/^[a-z0-9 -]+:.*## /{printf "%-23s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "Variables: CONFIG=$(CONFIG) DATA=$(DATA) TB_PORT=$(TB_PORT)"
	@echo "           MODEL STYLE TRAIN_ON RUN INPUT OUTPUT MERGED FLAGS"

install: $(VENV)/.installed ## create .venv with the tested package set

$(VENV)/.installed: $(LOCK) setup.cfg scripts/install.sh
	@scripts/install.sh $(VENV) $(LOCK)
	@touch $@

demo: install ## train DoRA on shipped rows, show scores (MODEL=smollm2)
	@$(PYTHON) scripts/demo.py --model=$(or $(MODEL),small)

setup-dirs: ## make data/raw, outputs and models
	mkdir -p $(DATA)/raw outputs models

download-model: install ## MODEL (else CONFIG's) from the Hub to models/NAME
	$(VENV)/bin/hf download $(HUB_MODEL) --local-dir models/$(notdir $(HUB_MODEL)) --exclude "original/*" "*.pth" "*.gguf"

process: install ## DATA/raw to chat rows in DATA/processed
	$(PYTHON) scripts/process_data.py --raw_path=$(DATA)/raw --out=$(DATA)/processed --config=$(CONFIG)

style: install ## STYLE in the system prompts: DATA/processed_with_style
	$(PYTHON) scripts/style_prompt.py --style=$(call quoted,$(value STYLE)) --in=$(DATA)/processed --out=$(DATA)/processed_with_style

render: install ## those rows through CONFIG's Jinja file: DATA/rendered
	$(PYTHON) scripts/render_template.py --data=$(DATA) --config=$(CONFIG)

full-pipeline: install ## process, style and render
	@$(MAKE) --no-print-directory process
	@$(MAKE) --no-print-directory style
	@$(MAKE) --no-print-directory render
	@echo "Train on a stage: make train TRAIN_ON=processed, processed_with_style or rendered"

train: install ## train as CONFIG says, on TRAIN_ON where it is given
	$(TRAIN)

train-bnb: CONFIG = configs/run_bnb.yaml
train-bnb: train ## train through bitsandbytes

train-unsloth: CONFIG = configs/run_unsloth.yaml
train-unsloth: train ## train through Unsloth, where it runs

train-tb train-with-tb: tensorboard train ## with TensorBoard; also train-bnb-tb, train-unsloth-tb
train-bnb-tb: tensorboard train-bnb
train-unsloth-tb: tensorboard train-unsloth

tensorboard tb: install ## start TensorBoard for TB_LOGDIR at TB_PORT
	@scripts/tensorboard.sh start $(TB_PORT) $(TB_LOGDIR) $(PYTHON)

tb-stop: ## end the TensorBoard started at TB_PORT, and no other
	@scripts/tensorboard.sh stop $(TB_PORT) $(TB_LOGDIR)

eval: eval-val ## evaluate RUN (CONFIG's output_dir) and its base

eval-val: install ## on the validation rows
	$(EVALUATE) --data_path=$(ROWS)/val.jsonl

eval-test: install ## on the test rows
	$(EVALUATE) --data_path=$(ROWS)/test.jsonl

eval-quick: install ## on the first 64 validation rows
	$(EVALUATE) --data_path=$(ROWS)/val.jsonl --limit=64

eval-full: install ## on validation and test rows
	$(EVALUATE) --data_path $(ROWS)/val.jsonl $(ROWS)/test.jsonl

infer: infer-interactive ## talk to RUN

infer-interactive: install ## the same
	$(INFER) --mode=interactive

infer-batch: install ## answer INPUT's rows into OUTPUT; goes on after a stop
	@mkdir -p $(dir $(OUTPUT))
	$(INFER) --mode=batch --input_file=$(INPUT) --output_file=$(OUTPUT)

merge: merge-bf16 ## merge RUN's adapter into its base, check they agree

merge-bf16: install ## into bf16 weights, in MERGED
	$(MERGE) --out=$(MERGED) --dtype=bf16

merge-test: install ## judge the merged model in MERGED again
	$(PYTHON) scripts/merge.py --verify=$(MERGED)

schema: install ## write configs/schema.json, for editors of run files
	$(PYTHON) scripts/make_schema.py

test: install ## run the default test suite
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses auto --dist worksteal

test-slow: install ## run the slow tests as well
	@OMP_NUM_THREADS=1 $(PYTHON) -m pytest --numprocesses auto --dist worksteal -m "not gpu"

lint: install ## ruff and mypy
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@$(PYTHON) -m mypy

check: lint test ## lint and test

clean: ## remove what runs and tools left, not .venv, not data
	@rm -rf output outputs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
