# make run   fetch the data, execute the lessons, print what they reached   (DATASET=name, folder or .zip)
# make test  lint, unit tests, and every notebook cell by cell
# make bench  how fast ratings become transitions, on a synthetic table of 20 million (needs 3 GB of disk), how fast
#             films are asked for, of a local stand-in for TMDB, and how fast DDPG learns: 12 minutes in all
# make results  judge policies and baselines by every protocol of lesson 10, five seeds each: hours
# make lab   open the lessons in JupyterLab
PYTHON  ?= python3.11
DATASET ?= ml-100k
BIN     := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run test bench results lab notes clean
.DELETE_ON_ERROR:

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "installing the requirements into .venv: a minute or two"
	$(BIN)/python -m pip install --quiet -r requirements.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

run: .venv/ready
	@$(BIN)/python -m helpers.series --dataset "$(DATASET)"

test: .venv/ready
	$(BIN)/ruff check .
	rm -rf .test
	@# nbval reads a cell's messages when the cell has ended and loses those beyond 1,000: let progress bars send few
	RECNN_ROOT=$(CURDIR)/.test TQDM_MININTERVAL=5 $(BIN)/python -m pytest helpers tests --nbval notes --nbval-cell-timeout=1800 -v

bench: .venv/ready
	$(BIN)/python -m tests.benchmarks.frames
	$(BIN)/python -m tests.benchmarks.metadata
	$(BIN)/python -m tests.benchmarks.agents

# the baselines of other libraries want other versions than ours, so they have an environment of their own
data/results-env/ready: requirements-results.txt
	$(PYTHON) -m venv data/results-env
	data/results-env/bin/python -m pip install --quiet -r requirements-results.txt
	data/results-env/bin/python -m pip install --quiet --no-deps recnn==0.1
	touch $@

results: .venv/ready data/results-env/ready
	$(BIN)/python -m tests.benchmarks.results --dataset "$(DATASET)"
	for protocol in last-5 last-1 temporal; do \
		data/results-env/bin/python tests/benchmarks/baselines.py data/$(DATASET)/results/$$protocol || exit 1; done
	$(BIN)/python -m tests.benchmarks.results --dataset "$(DATASET)" --add-scores

lab: .venv/ready
	cd notes && ../$(BIN)/jupyter lab

# for whoever edits a lesson: execute it into notes/ as it is committed, e.g. make notes ONLY="05 09"
notes: .venv/ready
	@$(BIN)/python -m helpers.series --dataset ml-100k --in-place --force $(ONLY)

clean:
	rm -rf .venv .test
