# make demo    prune a ViT on handwritten digits, run it, time a published shape   (a fresh clone needs nothing else)
# make test    the whole test suite
# make check   ruff, clang-format, mypy, import-linter, one op one name
# make sanitize  the C++ kernels' tests under AddressSanitizer and UBSan
# make bench   whole models against eager, torch.compile, ONNX Runtime and OpenVINO; fills the README's table
# make gpu     PART=tests|ragged_attention|norm_linear|fused_mlp|tune|model SHAPES= BATCH= IMPLS= OUT= WHEELS= SECONDS= BUILT=1:
#              on a machine with a GPU, with PYTHON as it is (no VENV): docs/performance-gpu.md
# make compile-check  what the compilers made of the GPU kernels, without a GPU
# Set PYTHON to choose an interpreter (3.11 or newer), VENV to choose where it is installed.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
CPLUSPLUS := $(shell find csrc tests -name "*.h" -o -name "*.cpp" -o -name "*.cu" -o -name "*.cuh")
SOURCES := setup.py setup_cuda.py pyproject.toml constraints.txt $(shell find csrc -type f 2>/dev/null)

.PHONY: demo test check format bench gpu compile-check sanitize clean

demo: $(VENV)/.installed
	$(BIN)/prunevit demo --out demo-out

test: $(VENV)/.installed
	$(BIN)/python -m pytest

check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPLUSPLUS)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m pytest tests/test_layout.py

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPLUSPLUS)

bench: $(VENV)/.installed
	$(BIN)/python bench/model.py --device cpu --out bench/results
	$(BIN)/python bench/tables.py

PART ?= tests
gpu:
	$(PYTHON) bench/gpu.py --part '$(PART)' --shapes '$(SHAPES)' --batch '$(BATCH)' --impls '$(IMPLS)' --out '$(or $(OUT),bench/results)' $(if $(WHEELS),--wheels '$(WHEELS)') $(if $(SECONDS),--seconds '$(SECONDS)') $(if $(BUILT),--built) $(if $(DRY_RUN),--dry-run)

compile-check: $(VENV)/.installed
	$(BIN)/python -m prunevit_kernels.compile_check
	$(BIN)/python -m prunevit.runtime.compile_check
	$(BIN)/python -m pytest tests/kernels/cuda/test_machine_code.py

# an instrumented copy of the kernels beside the ordinary one; leaks are not looked for, since Python keeps what it likes
sanitize: $(VENV)/.installed
	PRUNEVIT_SANITIZE=1 PRUNEVIT_CUDA_ARCHS= $(BIN)/python setup.py -q build --build-base build/sanitize --build-lib build/sanitize/lib
	PYTHONPATH=build/sanitize/lib LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	  ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  $(BIN)/python -m pytest -p no:cacheprovider tests/kernels/test_*.py

# the stamp depends on what is compiled: an edited kernel is rebuilt, an unchanged one is reused
$(VENV)/.installed: $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,check]'
	touch $@

clean:
	rm -rf build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis demo-out
	find . -name '*.so' -path '*prunevit_kernels*' -delete
