# Two commands matter: `make serve` and `make test`. Both install what is missing (apt), build, and run.

PRESET ?= release
BUILD  := build/$(PRESET)
JOBS   ?= $(shell nproc)
ARGS   ?=

.PHONY: help serve test build packages python asan-ubsan tsan fuzz clean

help:
	@echo "make serve    build, start router + prefill + decode with the demo model   (ARGS='--port 9000' for more)"
	@echo "make test     build and run every test"
	@echo "make build    build only; the program is $(BUILD)/baton"
	@echo "make asan-ubsan | tsan    unit tests under the sanitizers"
	@echo "make fuzz     every fuzzer for FUZZ_SECONDS (60) seconds"
	@echo "PRESET=dev    lightly optimised, quick to build"

packages:
	@tools/install_packages.sh

$(BUILD)/build.ninja: CMakeLists.txt CMakePresets.json | packages
	@echo "configuring $(BUILD) (log: $(BUILD).configure.log)"
	@mkdir -p build && cmake --preset $(PRESET) $(CONFIGURE) > $(BUILD).configure.log 2>&1 || { cat $(BUILD).configure.log; exit 1; }

build: packages $(BUILD)/build.ninja
	@if ! ninja -C $(BUILD) -n 2>/dev/null | grep -q 'no work to do'; then \
	  echo "building $(BUILD)"; NINJA_STATUS='[%f/%t %es] ' ninja -C $(BUILD) -j $(JOBS); fi

serve: build
	@exec $(BUILD)/baton serve $(ARGS)

# The OpenAI client for the end-to-end tests, in a virtual environment of its own.
build/python/.ready: tests/e2e/requirements.txt | packages
	@echo "installing the Python packages of the end-to-end tests"
	@mkdir -p build && python3 -m venv build/python && build/python/bin/pip install -q --disable-pip-version-check -r tests/e2e/requirements.txt
	@touch $@

python: build/python/.ready

test: build python
	@cd $(BUILD) && ctest --output-on-failure -j 2

asan-ubsan tsan: packages
	@$(MAKE) --no-print-directory build PRESET=$@
	@cd build/$@ && ctest --output-on-failure -j 2 -LE e2e

# Debian 12's clang 14 does not compile g++ 12's coroutines; its clang 16 does.
FUZZ_SECONDS ?= 60
BOOKWORM := $(shell grep -q '^VERSION_CODENAME=bookworm' /etc/os-release && echo yes)
FUZZ_PACKAGES := $(if $(BOOKWORM),clang-16 libclang-rt-16-dev,clang libclang-rt-dev)
fuzz:
	@tools/install_packages.sh $(FUZZ_PACKAGES)
	@$(MAKE) --no-print-directory build PRESET=fuzz CONFIGURE=-DCMAKE_CXX_COMPILER=clang++$(if $(BOOKWORM),-16)
	@fuzz/run_all.sh build/fuzz $(FUZZ_SECONDS)

clean:
	rm -rf build
