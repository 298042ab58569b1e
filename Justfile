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
      $cc -std=gnu11 -O3 -Wall -Wextra -Wconversion -Werror -fsyntax-only native/steer.c && echo "$cc: no warnings"; fi; done

# Effect and cost of every preset on both small models (half an hour)
bench-probes *args:
    {{python}} benchmarks/probe_gaps.py {{args}}

# What steering costs, told on docs/speed.md (some 13 minutes, on a machine that does nothing else)
bench-speed *args:
    {{python}} benchmarks/speed.py --output docs/speed.md {{args}}

# What every method does within the damage budget: the quality part of docs/results.md (hours; resumes)
bench-quality *args:
    {{python}} benchmarks/quality.py {{args}}
