# Every command sets itself up: a virtual environment in .venv, made anew when pyproject.toml changes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
SOURCES := samplers distill tools tests

# Tests run in as many processes of one thread each: on two cores that is faster than two threads in one.
JOBS ?= 2

# CI runs the slow tests too; `make test CI=1` does the same at home.
ifdef CI
MARKERS := -m "not gpu and not network"
endif

.PHONY: demo test check format bench clean

demo: $(READY)  ## the main job on the embedded digits: teacher, one-step student, table, pictures
	$(BIN)/distill teach --config configs/digits-teacher.yaml --resume
	$(BIN)/distill train --config configs/digits-reverse-kl.yaml --resume
	$(BIN)/distill export runs/digits-reverse-kl runs/digits-student
	$(BIN)/distill sample teacher=runs/digits-teacher student=runs/digits-student --out runs/digits-teacher-student.png
	$(BIN)/distill-fid batch configs/digits-evaluation.yaml --workers $(JOBS)
	@echo "pictures: runs/digits-teacher-student.png, runs/digits-reverse-kl/curves.png, runs/digits-*/samples"

test: check

check: $(READY)  ## format, lint, types, tests: exactly what CI runs
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/mypy
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist loadfile $(MARKERS)

format: $(READY)
	$(BIN)/ruff format $(SOURCES)
	$(BIN)/ruff check --fix $(SOURCES)

bench: $(READY)  ## the numbers that README.md and BENCHMARKS.md quote (hours; `python -m tools.bench PART` prints one)
	$(BIN)/python -m tools.bench

clean:
	rm -rf $(VENV) runs

# torch and torchvision come together: torchvision imports only with the torch that it was built for.
$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet torch torchvision
	$(BIN)/python -m pip install --quiet --editable ".[test]"
	touch $@
