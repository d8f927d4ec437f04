PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# Ray reports usage over the network unless told not to.
export RAY_USAGE_STATS_ENABLED := 0

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow chaos lint audit format benchmark-site benchmark-segmentation benchmark-retrieval benchmark-index benchmark-recipes benchmark-training benchmark-train-loading benchmark-ablations benchmark-report benchmark-network benchmark-engine benchmark-scale benchmark-memory benchmark-costs clean

help:
	@echo "make demo       simulate a small screen, run every stage, ask it a question (into demo/)"
	@echo "make test       the tests, without the slow ones"
	@echo "make test-slow  the slow tests: whole runs, kills and resumes"
	@echo "make chaos      20 runs on a cluster of this machine while workers, nodes, drivers and the store fail"
	@echo "make lint       ruff and mypy, yamllint and shellcheck"
	@echo "make audit      what constraints.txt pins, looked up among known vulnerabilities; wants the network"
	@echo "make format     let ruff rewrite the code"
	@echo "make benchmark-site  a site's steps, speed and F1, beside the plain scikit-image way"
	@echo "make benchmark-segmentation  nuclei and cells against truth, beside the plain scikit-image way"
	@echo "make benchmark-training  what the steps of training cost, beside the plain ways"
	@echo "make benchmark-retrieval  retrieval metrics beside a loop over queries, and their memory"
	@echo "make benchmark-index  a query among a million cells, beside exact search and ScaNN"
	@echo "make benchmark-recipes SCREEN=…  settings of recipes chosen on some compounds, scored on others"
	@echo "make benchmark-train-loading  training through the loader beside batches in memory"
	@echo "make benchmark-network  clips a second of training and embedding, and their share of the device's matrix rate"
	@echo "make benchmark-ablations  MitoReID's two tables on a simulated screen (into ablations/)"
	@echo "make benchmark-engine  units of 1 s, 0.1 s and 10 ms and real wells through Ray, beside a plain loop"
	@echo "make benchmark-scale  the engine with 100 to 100,000 units; nodes, cores, cells a unit"
	@echo "make benchmark-memory  peaks of memory over 8 and 16 GiB of pixels with a small object store"
	@echo "make benchmark-costs  time, storage and cost of 1,000 × 384 wells, extrapolated"
	@echo "make benchmark-report  the page of a 384-well screen: its size, and how soon a browser shows it"
	@echo "make clean      remove the environment, caches, builds and demo/"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: $(INSTALLED)
	$(BIN)/screening demo

test: $(INSTALLED)
	$(BIN)/pytest -m "not slow" --numprocesses 2 --dist loadfile

test-slow: $(INSTALLED)
	$(BIN)/pytest -m slow

chaos: $(INSTALLED)
	$(BIN)/python tests/chaos.py $(SEEDS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/yamllint --strict .
	$(BIN)/shellcheck .ci/run

audit: $(INSTALLED)
	$(BIN)/python .ci/audit.py

format: $(INSTALLED)
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

benchmark-site: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/site.py 1024
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/site.py 2048 3

benchmark-segmentation: $(INSTALLED)
	$(BIN)/python benchmarks/segmentation.py

benchmark-retrieval: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/retrieval.py

benchmark-index: $(INSTALLED)
	$(BIN)/pip install --constraint constraints.txt --editable '.[benchmark]'
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/index.py

benchmark-recipes: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/recipes.py $(SCREEN)

benchmark-training: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/training.py

benchmark-train-loading: $(INSTALLED)
	$(BIN)/python benchmarks/train_loading.py

benchmark-network: $(INSTALLED)
	$(BIN)/python benchmarks/network.py

benchmark-ablations: $(INSTALLED)
	$(BIN)/python benchmarks/ablations.py ablations

benchmark-engine: $(INSTALLED)
	$(BIN)/python benchmarks/engine.py

benchmark-scale: $(INSTALLED)
	$(BIN)/python benchmarks/scale.py

benchmark-memory: $(INSTALLED)
	$(BIN)/python benchmarks/memory.py

benchmark-costs: $(INSTALLED)
	$(BIN)/python benchmarks/costs.py

benchmark-report: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/report.py

clean:
	rm -rf $(VENV) demo ablations build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
