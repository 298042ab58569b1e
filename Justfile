# What CI runs, and what you run before a commit.

python := env("PYTHON", "python")

# Everything CI checks
check: lint types test

# The test suite; arguments go to pytest
test *args:
    {{python}} -m pytest {{args}}

# The minutes-long tests on real models
test-slow *args:
    {{python}} -m pytest -m slow {{args}}

lint:
    {{python}} -m ruff check .
    {{python}} -m ruff format --check .

types:
    {{python}} -m mypy

format:
    {{python}} -m ruff check --fix .
    {{python}} -m ruff format .

# The C library with every warning an error, by each compiler there is
native-warnings:
    for cc in gcc clang; do if command -v $cc >/dev/null; then \
      $cc -std=gnu11 -O3 -fopenmp-simd -Wall -Wextra -Wconversion -Wshadow -Werror -fsyntax-only -I native \
        native/*.c native/tests/*.c && echo "$cc: no warnings"; fi; done

# The C library on a fake ggml, under the address and undefined-behaviour sanitizers
native-test:
    mkdir -p build
    cc -std=gnu11 -g -O1 -fopenmp-simd -fsanitize=address,undefined -fno-sanitize-recover -DSTEER_NO_CLONES -I native \
      native/*.c native/tests/fake_ggml.c native/tests/test_steer.c -lm -o build/test_steer
    build/test_steer

# Instructions the hook costs a token, by callgrind: with no steering on, one, three
native-cost:
    mkdir -p build
    cc -std=gnu11 -O3 -g -fopenmp-simd -ffp-contract=fast -I native native/*.c native/tests/cost.c -lm -o build/cost
    for on in 0 1 3; do valgrind --tool=callgrind --toggle-collect=steer_eval \
      --callgrind-out-file=build/cost.$on build/cost $on 2>&1 | grep -E "Collected|a token"; done

# Effect and cost of every preset on both small models (half an hour)
bench-probes *args:
    {{python}} benchmarks/probe_gaps.py {{args}}

# What steering costs, told on docs/speed.md (some 13 minutes, on a machine that does nothing else)
bench-speed *args:
    {{python}} benchmarks/speed.py --output docs/speed.md {{args}}

# What every method does within the damage budget: the quality part of docs/results.md (hours; resumes)
bench-quality *args:
    {{python}} benchmarks/quality.py {{args}}
