# make run   fetch the data, execute the lessons, print what they reached   (DATASET=name, folder or .zip;
#            WORKERS=n or RAY_ADDRESS of a running cluster: lesson 13's workers, with Ray of requirements-ray.txt;
#            QUICK=1: one seed and few steps, to see that all runs; ONLY="05 09": these and what they read from)
# make check  style, types and unit tests: three minutes
# make test  the same, every notebook cell by cell (those that train agents with few steps), and all of them, short, on
#            three made tables; FULL=1 trains as the lessons do and compares every number: an hour
# make faults  put 25 one-line faults into a copy of the code, one at a time, and say which the unit tests notice: ten
#            minutes
# make bench  how fast ratings become transitions, on a synthetic table of 20 million (needs 3 GB of disk), how fast
#             films are asked for, of a local stand-in for TMDB, how fast DDPG learns, how fast the service
#             answers, and with Ray how fast two workers make transitions: 18 minutes in all
# make results  judge policies and baselines by every protocol of lesson 10, five seeds each, and the agents, policies
#            and estimates of lessons 15 to 17 in their worlds: hours
# make figures  draw lesson 09's debug figures anew from the last run, in half a minute, into data/<dataset>/res
# make book  the lessons and the pages beside them as a site with search, in .book/html
# make colab REPO=https://github.com/you/recnn  copies of the lessons, in .colab, that bring what they need to Colab
# make lab   open the lessons in JupyterLab
# make serve  recommend in the browser with what lesson 11 wrote, at http://127.0.0.1:8000   (DATASET, ADDRESS, PORT)
# make docker-check  build and start both images, where Docker answers
PYTHON  ?= python3.11
DATASET ?= ml-100k
ADDRESS ?= 127.0.0.1
PORT    ?= 8000
BIN     := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: run figures check test faults bench results book colab lab serve docker-check notes agents clean
.DELETE_ON_ERROR:

.venv/ready: requirements.txt build/requirements.txt constraints.txt pyproject.toml
	$(PYTHON) -m venv .venv
	@echo "installing the requirements into .venv: a minute or two"
	$(BIN)/python -m pip install --quiet -r requirements.txt -c constraints.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

.venv/ready-dev: requirements-dev.txt .venv/ready
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

run: .venv/ready
	@$(BIN)/python -m tools.run --dataset "$(DATASET)" --workers "$(WORKERS)" $(if $(QUICK),--quick) $(if $(ONLY),--chain $(ONLY))

figures: .venv/ready
	@$(BIN)/python -m tools.run --dataset "$(DATASET)" --force 09

check: .venv/ready-dev
	$(BIN)/ruff check .
	rm -rf .test/units
	$(MAKE) --no-print-directory --keep-going --jobs 2 check-units check-types

test: .venv/ready-dev
	$(BIN)/ruff check .
	rm -rf .test
	RECNN_ROOT=$(CURDIR)/.test $(BIN)/python -c "from helpers import datasets as d; d.fetch('ml-100k'), d.fetch_model()"
	$(MAKE) --no-print-directory --keep-going --jobs 2 check-data check-units check-types check-05 check-tables $(CHECKED)
	$(MAKE) --no-print-directory check-ray

# Two lanes of one thread each do more than one of two. A lesson waits for those whose artefacts it reads; what others
# wait for, or takes longest, stands first. nbval reads a cell's messages when the cell has ended and loses those
# beyond 1,000, so progress bars send few.
CHECKED := $(addprefix check-,05 05b 08 06 07 14 15 16 17 11 12 13 10 09 10b)
PYTEST  := OMP_NUM_THREADS=1 NUMBA_NUM_THREADS=1 TQDM_MININTERVAL=5 $(BIN)/python -m pytest -v
NBVAL   := RECNN_ROOT=$(CURDIR)/.test RECNN_STRICT=$(FULL) $(PYTEST) --nbval-cell-timeout=3600
SHORT   := 05 05b 06 07 08 09 10 10b 11 14 15 16 17  # train agents, or read what was trained: with few steps the numbers are others
.PHONY: check-data check-units check-types check-ray check-tables $(CHECKED)
# all lessons, short, on three made tables as people have them
check-tables:
	RECNN_TABLES=1 RECNN_ROOT=$(CURDIR)/.test/tables $(PYTEST) tests/test_any_table.py
check-types:
	$(BIN)/mypy
check-units:
	RECNN_ROOT=$(CURDIR)/.test/units $(PYTEST) helpers tools tests
# Ray lies beside the requirements, so that all the rest is tested without it; it runs by itself, for its nodes end where
# their agents take 15 seconds to start
.venv/with-ray/ready: requirements-ray.txt .venv/ready
	rm -rf .venv/with-ray
	$(BIN)/python -m pip install --quiet --no-deps --target .venv/with-ray -r requirements-ray.txt
	touch $@
check-ray: .venv/with-ray/ready
	RECNN_ROOT=$(CURDIR)/.test/ray PYTHONPATH=$(CURDIR)/.venv/with-ray $(PYTEST) tests/test_cluster.py
check-data:
	$(BIN)/python -m tools.run --copies .test/short
	$(NBVAL) --nbval notes/0[0-4]*_*.ipynb docs/answers.ipynb
$(CHECKED): check-%:
	$(NBVAL) $(if $(FULL),--nbval notes,$(if $(filter $*,$(SHORT)),--nbval-lax .test/short,--nbval notes))/$*_*.ipynb
check-05 check-12 check-13 check-15 check-16 check-17: check-data
check-05b: check-05
check-06 check-07 check-08 check-11 check-14: check-05b
check-09 check-10 check-10b: check-06 check-07 check-08

faults: .venv/ready-dev
	$(BIN)/python -m benchmarks.faults

bench: .venv/ready
	$(BIN)/python -m benchmarks.frames
	$(BIN)/python -m benchmarks.metadata
	$(BIN)/python -m benchmarks.agents
	$(BIN)/python -m benchmarks.scale
	$(BIN)/python -m benchmarks.service
	$(BIN)/python -m benchmarks.cluster

# the baselines of other libraries want other versions than ours, so they have an environment of their own
data/results-env/ready: requirements-results.txt
	$(PYTHON) -m venv data/results-env
	data/results-env/bin/python -m pip install --quiet -r requirements-results.txt
	data/results-env/bin/python -m pip install --quiet --no-deps recnn==0.1
	touch $@

results: .venv/ready data/results-env/ready
	$(BIN)/python -m benchmarks.results --dataset "$(DATASET)"
	for protocol in last-5 last-1 temporal; do \
		data/results-env/bin/python benchmarks/baselines.py data/$(DATASET)/results/$$protocol || exit 1; done
	$(BIN)/python -m benchmarks.results --dataset "$(DATASET)" --add-scores
	for study in field foresight reinforce estimates; do \
		$(BIN)/python -m benchmarks.$$study --dataset "$(DATASET)" || exit 1; done

book: .venv/ready-dev
	@$(BIN)/python -m tools.book

colab: .venv/ready
	@$(BIN)/python -m tools.colab "$(REPO)"

lab: .venv/ready
	cd notes && ../$(BIN)/jupyter lab

serve: .venv/ready
	@folder="$$($(BIN)/python -c 'import sys; from helpers.files import build_dir; print(build_dir(sys.argv[1]))' \
		"$(DATASET)")"; \
	test -f "$$folder/service.py" || { echo "no model of $(DATASET) yet: make run DATASET=$(DATASET)"; exit 1; }; \
	exec $(BIN)/python -m uvicorn service:app --app-dir "$$folder" --host $(ADDRESS) --port $(PORT)

docker-check: .venv/ready-dev
	RECNN_DOCKER=1 $(BIN)/python -m pytest -s -rs tests/test_docker.py

# for whoever edits a lesson: execute it into notes/ as it is committed, e.g. make notes ONLY="05 09"
notes: .venv/ready
	@$(BIN)/python -m tools.run --dataset ml-100k --in-place --force $(ONLY)

# write helpers/agents/ anew from the lesson cells, e.g. after a lesson was changed in JupyterLab
agents: .venv/ready
	@$(BIN)/python -m tools.export

clean:
	rm -rf .venv .test
