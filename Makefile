# make report [RUN=tiny] [SET="key=value other=value"]   the study and its report, in reports/$(RUN)/
# make test | bench | lab                                all tests | all benchmarks | the notebooks in JupyterLab
# make rehearsal-gpu                      times at 7B's shapes on an NVIDIA GPU, installing nothing, in reports/gpu-rehearsal/
# make check-gpu [CHECK="name other"]      what tests on a CPU cannot see, on any GPU, planned for eight minutes
# make kaggle OWNER=you [RUN=small MODEL=... IMAGE=...]   what goes to Kaggle, in build/kaggle; installs nothing
# make mock-kaggle                        the smoke study and a cut of small, each in two sessions of a mock Kaggle
# The others install what is missing into .venv; PYTHON=... names another Python (3.11 to 3.13).
RUN := tiny
SET :=
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3 python; do "$$name" -c \
	'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null && echo "$$name" && break; done)
VENV := .venv/bin/python
export SET

.PHONY: report test bench lab kaggle mock-kaggle rehearsal-gpu check-gpu install
.DEFAULT_GOAL := report

report: install
	@$(VENV) -m derm_compress run "params/$(RUN).yaml" $(if $(SET),--set "$$SET")

test: install
	@OMP_NUM_THREADS=1 $(VENV) -m pytest -n 2

bench: install
	@for script in $(wildcard benchmarks/*.py); do echo "$$script"; $(VENV) "$$script" || exit 1; done

lab: install
	@$(VENV) -m jupyterlab notebooks

kaggle: RUN := small
kaggle:
	@PYTHONPATH=. "$(PYTHON)" -m derm_compress.kaggle.build build/kaggle --run "$(RUN)" --owner "$(OWNER)" \
		--model "$(MODEL)" --image "$(IMAGE)"

mock-kaggle: install
	@OMP_NUM_THREADS=1 $(VENV) tests/mock_kaggle.py

install: .venv/installed

.venv/installed: requirements.txt pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11, 3.12 or 3.13 is needed; name one: make PYTHON=/path/to/python"; exit 2; }
	"$(PYTHON)" -m venv .venv
	$(VENV) -m pip install --disable-pip-version-check -r requirements.txt
	$(VENV) -m pip install --disable-pip-version-check --no-deps -e .
	@touch $@

check-gpu:
	@PYTHONPATH=. "$(PYTHON)" -m tools.check_gpu $(CHECK)

rehearsal-gpu:
	@PYTHONPATH=. "$(PYTHON)" benchmarks/gpu.py --out reports/gpu-rehearsal
