# Everything runs in .venv, which the first command makes. `make demo` and `make test` are the two to know.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed
FLOWER := .venv-flower
LOWEST := .venv-lowest
# Compiled tests and modules are kept, whatever the machine's default is: half of the time before the first test.
export PYTHONDONTWRITEBYTECODE :=

.PHONY: demo test test-slow test-flower test-lowest check new try claims lint types prose docs notebooks bench bench-check catalogue tour lock clean

demo: $(STAMP)  ## learn from labelled game clips, find violent moments in a video, write a page
	$(BIN)/python -m counterpoint.demo

test: $(STAMP)  ## the default test suite; set COUNTERPOINT_DATA to a folder of extra data to skip nothing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal --durations 30 --durations-min 4

test-slow: $(STAMP)  ## the tests of several seconds each: runs over two processes, exports, whole journeys
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'slow and not claim' -n auto --dist worksteal --durations 10 --durations-min 8

test-flower: $(FLOWER)/.installed  ## federations on Flower, in .venv-flower, where Flower's pins stand before ours
	OMP_NUM_THREADS=1 $(FLOWER)/bin/python -m pytest tests/use/test_flower.py

test-lowest: $(LOWEST)/.installed  ## the default suite with the lowest versions of pyproject.toml; its PyTorch is gigabytes
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -n auto --timeout 300

check: $(STAMP)  ## all that CI runs: linter, type checker, English, tests, slow tests
	bash .ci/run

new: $(STAMP)  ## start a system: SLUG=, and for one that is not planned TITLE=, AREA=, FORM=
	$(BIN)/python tools/new.py $(SLUG) --title "$(TITLE)" --arxiv "$(ARXIV)" --area "$(AREA)" --form "$(FORM)"

try: $(STAMP)  ## the tests of one system and of the catalogue: SLUG=
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/systems/test_$(subst -,_,$(SLUG)).py tests/test_catalog.py tests/lab/test_protocol.py

claims: $(STAMP)  ## every claim that is due, one after another; goes on where it stopped
	OMP_NUM_THREADS=1 $(BIN)/python -m counterpoint.lab.rerun --into RESULTS.md

lint: $(STAMP)  ## linter and formatter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)  ## type checker
	$(BIN)/mypy

prose: $(STAMP)  ## the English of docstrings, messages and pages
	$(BIN)/python tools/prose.py

notebooks: $(STAMP)  ## the notebooks of docs/notebooks that changed, executed, with their outputs, into build/notebooks/
	$(BIN)/python tools/notebooks.py

docs: notebooks  ## the documentation, into site/
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --strict

bench: $(STAMP)  ## speed and memory against peers, into results/bench/; more than an hour
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[bench]'
	$(BIN)/python benchmarks/contrast.py
	$(BIN)/python benchmarks/macil_sd.py
	$(BIN)/python benchmarks/detection.py
	$(BIN)/python benchmarks/views.py
	$(BIN)/python benchmarks/albef.py
	$(BIN)/python benchmarks/alignment.py
	$(BIN)/python benchmarks/audio_sheet_retrieval.py
	$(BIN)/python benchmarks/cacr.py
	$(BIN)/python benchmarks/fixed_keys.py
	$(BIN)/python benchmarks/images.py
	$(BIN)/python benchmarks/obow.py
	$(BIN)/python benchmarks/bss.py
	$(BIN)/python benchmarks/mlcd.py
	$(BIN)/python benchmarks/krr_st.py
	$(BIN)/python benchmarks/cmd_levels.py
	$(BIN)/python benchmarks/any2seg.py
	$(BIN)/python benchmarks/pcl_sr.py
	$(BIN)/python benchmarks/pixpro.py
	$(BIN)/python benchmarks/pix_contrast.py
	$(BIN)/python benchmarks/ctvis.py
	$(BIN)/python benchmarks/wscol.py
	$(BIN)/python benchmarks/esp_medsam.py
	$(BIN)/python benchmarks/class_texts.py
	$(BIN)/python benchmarks/global_local_seg.py
	$(BIN)/python benchmarks/tinyclip.py
	$(BIN)/python benchmarks/diswot.py
	$(BIN)/python benchmarks/kd3.py
	$(BIN)/python benchmarks/crd.py
	$(BIN)/python benchmarks/dcd.py
	$(BIN)/python benchmarks/hybrid_distill.py
	$(BIN)/python benchmarks/promptkd.py
	$(BIN)/python benchmarks/gopro.py
	$(BIN)/python benchmarks/supremix.py
	$(BIN)/python benchmarks/mulki.py
	$(BIN)/python benchmarks/sepclr.py
	$(BIN)/python benchmarks/capro.py
	$(BIN)/python benchmarks/mclrec.py
	$(BIN)/python benchmarks/decoding.py
	$(BIN)/python benchmarks/comd.py
	$(BIN)/python benchmarks/dpo.py
	$(BIN)/python benchmarks/switchgpt.py
	$(BIN)/python benchmarks/clhe.py
	$(BIN)/python benchmarks/coconut.py
	$(BIN)/python benchmarks/teminal.py
	$(BIN)/python benchmarks/llava_mod.py
	$(BIN)/python benchmarks/cosmo.py
	$(BIN)/python benchmarks/creamfl.py
	$(BIN)/python benchmarks/vidlankd.py
	$(BIN)/python benchmarks/space_2.py
	$(BIN)/python benchmarks/supcon_t2i.py
	$(BIN)/python benchmarks/customcontrast.py
	$(BIN)/python benchmarks/mend.py
	$(BIN)/python benchmarks/sinc.py
	$(BIN)/python benchmarks/torchdistill_losses.py

bench-check: $(STAMP)  ## compare the records that `make bench` wrote with those of the last commit
	$(BIN)/python benchmarks/check.py

catalogue: $(STAMP)  ## the table of systems in SYSTEMS.md, from the catalogue
	$(BIN)/python -m counterpoint.catalog SYSTEMS.md

tour: $(STAMP)  ## every system for one epoch, and a page with a picture of each, into tour/; goes on where it stopped
	$(BIN)/python tools/tour.py

lock: $(STAMP)  ## constraints.txt: every version that is installed here
	$(BIN)/python tools/lock.py

clean:  ## the environment and what was built
	rm -rf .venv .venv-flower .venv-lowest site build dist runs .mypy_cache .ruff_cache .pytest_cache

# The arcade, qtawesome, pretty_midi, recbole and nilearn wheels are wanted for sprites, sounds, fonts, soundfont and data only,
# tinysoundfont without what it plays through. litdata's boto3 refuses the python-dateutil of constraints.txt, and runs with it.
ALONE := arcade qtawesome tinysoundfont pretty_midi recbole nilearn
LITDATA := litdata obstore tifffile boto3 botocore s3transfer jmespath
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "counterpoint needs Python 3.11 or newer")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[demo,dev]'
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps $(ALONE)
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps $(LITDATA)
	touch $(STAMP)

# Flower's packages come first, all others from .venv.
$(FLOWER)/.installed: $(STAMP) constraints-flower.txt
	rm -rf $(FLOWER)
	$(PYTHON) -m venv $(FLOWER)
	echo "import site; site.addsitedir('$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')')" \
	  > "$$($(FLOWER)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	$(FLOWER)/bin/python -m pip install --quiet --constraint constraints-flower.txt 'flwr[simulation]'
	touch $(FLOWER)/.installed

# uv knows how to choose the lowest versions; pip does not.
$(LOWEST)/.installed: pyproject.toml
	rm -rf $(LOWEST)
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet uv
	$(LOWEST)/bin/uv pip install --python $(LOWEST)/bin/python --resolution lowest-direct --editable '.[demo,dev]'
	$(LOWEST)/bin/python -m pip install --no-deps $(ALONE) $(LITDATA)
	$(LOWEST)/bin/python -m pip install pytest-timeout
	touch $@
