# What CI runs, and what you run before a commit.

python := env("PYTHON", "python")
export NO_MKDOCS_2_WARNING := "1"

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

# Types, of the packages as they lie when installed: converters/ inside edge_steer/
types:
    rm -rf build/types/edge_steer && mkdir -p build/types
    cp -R edge_steer build/types && cp -R converters build/types/edge_steer
    cd build/types && {{python}} -m mypy --config-file ../../pyproject.toml
    cd tests && {{python}} -m mypy --config-file mypy.ini .

format:
    {{python}} -m ruff check --fix .
    {{python}} -m ruff format .

# The suite on another release of llama-cpp-python, compiled in an environment of its own: `just try-llama-cpp 0.3.37`
try-llama-cpp version *args:
    {{python}} -m venv --clear build/llama-cpp-{{version}}
    build/llama-cpp-{{version}}/bin/python -m pip install --quiet --no-binary llama-cpp-python --no-cache-dir \
      "llama-cpp-python=={{version}}"
    build/llama-cpp-{{version}}/bin/python -m pip install --quiet "llama-cpp-python=={{version}}" -e '.[dev]'
    build/llama-cpp-{{version}}/bin/python -m edge_steer doctor
    build/llama-cpp-{{version}}/bin/python -m pytest {{args}}

# The site in build/site; a dead link, a wrong name or a page that is not in the menu is an error (needs the extra `docs`)
docs:
    {{python}} -m mkdocs build --strict

# The site at http://127.0.0.1:8000, built again at every change
docs-serve:
    {{python}} -m mkdocs serve

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

# The C library's own test under a sanitizer; warnings in the test are errors too
[private]
native-sanitized name flags:
    @mkdir -p build/sanitize
    @cc -std=gnu11 -g -O1 -fopenmp-simd -Wall -Wextra -Werror -fno-omit-frame-pointer -DSTEER_NO_CLONES {{flags}} \
      native/*.c native/tests/sanitize_steer.c -lm -lpthread -o build/sanitize/{{name}}
    @echo -n "{{name}}: " && build/sanitize/{{name}}
    @cc -std=gnu11 -g -O1 -fopenmp-simd -Wall -Wextra -Werror -fno-omit-frame-pointer -DSTEER_NO_CLONES {{flags}} \
      native/*.c native/tests/fake_ggml.c native/tests/threads_steer.c -lm -lpthread -o build/sanitize/{{name}}-threads
    @echo -n "{{name}}: " && build/sanitize/{{name}}-threads

# No access out of bounds, after freeing, or leaked
native-asan: (native-sanitized "asan" "-fsanitize=address")

# No undefined behaviour
native-ubsan: (native-sanitized "ubsan" "-fsanitize=undefined -fno-sanitize-recover=all")

# No data race between two models in two threads
native-tsan: (native-sanitized "tsan" "-fsanitize=thread")

# The three of them, seconds each
native-sanitizers: native-asan native-ubsan native-tsan

# Feed the C library random programs of calls (needs clang with libFuzzer); inputs that found something new are kept
fuzz-native seconds="600":
    #!/usr/bin/env bash
    set -euo pipefail
    mkdir -p build/fuzz/native
    cd build/fuzz
    flags="-g -O1 -fopenmp-simd -std=gnu11 -fno-sanitize-recover=undefined -fsanitize=address,undefined"
    for source in ../../native/*.c; do
      clang $flags,fuzzer-no-link -Dmalloc=fuzz_malloc -Dcalloc=fuzz_calloc -Drealloc=fuzz_realloc \
        -c "$source" -o "native-$(basename "$source" .c).o"
    done
    clang $flags,fuzzer ../../tests/fuzz/fuzz_steer.c native-*.o -lm -o fuzz_steer
    ASAN_OPTIONS=allocator_may_return_null=1:max_allocation_size_mb=64 \
      ./fuzz_steer -max_total_time={{seconds}} -max_len=4096 -timeout=10 -print_final_stats=1 -verbosity=0 native

# Feed the readers of GGUF and prompt files random bytes, SECONDS each (needs `pip install atheris`)
fuzz-files seconds="600":
    mkdir -p build/fuzz
    for target in gguf prompts; do \
      {{python}} tests/fuzz/fuzz_files.py $target build/fuzz/$target -max_total_time={{seconds}} -timeout=10 \
        -rss_limit_mb=1024 -max_len=4096 -print_final_stats=1 -verbosity=0 -artifact_prefix=build/fuzz/ || exit 1; \
    done

# Processor time and memory of every flipped bit and every length of small files, and of large files' claims
hostile-cost:
    {{python}} tests/fuzz/hostile_cost.py

# Thousands of answers with everything changing, held against fresh contexts; `just soak -m smollm2-135m --answers 300`
soak *args:
    {{python}} tests/external/soak.py {{args}}

# `serve --upstream` in front of a real llama-server, against the hook: `just try-llama-server --server PATH`, or --build
try-llama-server *args:
    {{python}} tests/external/upstream.py {{args}}

# Turning on a GPU, on a machine without: ggml's Vulkan backend, compiled (many minutes), on Mesa's software device
try-vulkan *args:
    {{python}} tests/external/vulkan.py {{args}}

# 2,000 requests from 32 clients at once, held against fresh models
soak-server *args:
    {{python}} tests/external/serve_soak.py {{args}}

# What serving costs, beside the model alone and peers, told on docs/results.md (on a machine that does nothing else)
bench-serving *args:
    {{python}} benchmarks/serving.py --results docs/results.md {{args}}

# llama-cpp-python's own tests with SteeredLlama in place of Llama, beside the plain one (quarter of an hour)
peer-suite *args:
    {{python}} tests/external/peer_suite.py {{args}}

# Real clients of llama-cpp-python over a SteeredLlama, each in an environment of its own (downloads; half an hour)
clients *args:
    {{python}} tests/external/clients/run.py {{args}}

# Effect and cost of every preset on both small models (half an hour)
bench-probes *args:
    {{python}} benchmarks/probe_gaps.py {{args}}

# What steering costs, told on docs/results.md (some 15 minutes, on a machine that does nothing else)
bench-speed *args:
    {{python}} benchmarks/speed.py --results docs/results.md {{args}}

# How well readings tell a preset's two sides apart, told on docs/reading.md (an hour on an idle machine; resumes)
bench-reading *args:
    {{python}} benchmarks/reading.py --results docs/reading.md {{args}}

# What every method does within the damage budget: the quality part of docs/results.md (hours; resumes)
bench-quality *args:
    {{python}} benchmarks/quality.py {{args}}

# Effects, texts and crossed presets on four models, the 1.5B among them: the first part of docs/results.md (hours; resumes)
bench-effects *args:
    {{python}} benchmarks/effects.py {{args}}

# Two steerings at once: what each does alone, both, and combined; the tables of docs/composing.md (resumes)
bench-interaction *args:
    {{python}} benchmarks/interaction.py {{args}}

# The measured steerings that ship, of what bench-effects has calibrated
shipped-set *args:
    {{python}} benchmarks/shipped_set.py {{args}}
