#!/usr/bin/env bash
# What only a GPU can answer, within twelve minutes, on a machine with nothing but this repository, torch, triton, pytest,
# pytest-benchmark and rich (transformers for the last question). The list, in order, is bench/questions.py; results go to
# $OUT (default bench/results), one JSON and one page, written after each answer. `bench/gpu.sh --tiny` needs no GPU and
# proves that it runs.
# Parts by name, within ten minutes: `bench/gpu.sh tests errors growth` for all GPU tests (they need hypothesis), the table
# of errors and the goals of growth, `bench/gpu.sh benches`, and `bench/gpu.sh tune`, which tries settings of the
# vocabulary kernels for about three minutes. Peers are timed where they are installed, or lie in build/peers: see
# bench/peers.py.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
if [ -d build/peers ]; then PYTHONPATH="$PYTHONPATH:$PWD/build/peers"; fi
out=${OUT:-bench/results}
if [ "${*:-}" = --tiny ]; then
    exec python3 bench/questions.py --tiny --out "$out"
fi
parts=" ${*:-questions} "
unset TRITON_INTERPRET # kernels are to run on the GPU
start=$SECONDS
limit=585 # seconds for everything but the questions

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
python3 - <<'PYTHON'
import platform, torch, triton
print(f"python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}, cuda {torch.version.cuda}")
assert torch.cuda.is_available(), "torch sees no CUDA device"
PYTHON

# A part that fails or runs out of time does not keep the other from running; the script fails in the end.
status=0
if [[ $parts == *" questions "* ]]; then
    echo "== questions"
    timeout --kill-after=5 710 python3 bench/questions.py --out "$out" --limit 690 || status=$?
fi
if [[ $parts == *" tests "* ]]; then
    echo "== tests"
    # Without the tests of the command, the examples and README, which do nothing on a GPU.
    timeout --kill-after=5 200 python3 -m pytest tests -q --maxfail=20 --ignore=tests/test_bench.py \
        --ignore=tests/test_command.py --ignore=tests/test_examples.py --ignore=tests/test_readme.py || status=$?
    echo "== tests ended with $status after $((SECONDS - start)) s"
fi
if [[ $parts == *" tune "* ]]; then
    echo "== tune"
    timeout --kill-after=5 240 python3 bench/tune.py --out "$out" --limit 170 || status=$?
fi
if [[ $parts == *" errors "* ]]; then
    echo "== errors"
    timeout --kill-after=5 90 python3 bench/errors.py --out "$out" || status=$?
fi
if [[ $parts == *" growth "* ]]; then
    echo "== growth and goals of common_prefix_lengths"
    timeout --kill-after=5 100 python3 -m bench.bench_growth || status=$?
fi
if [[ $parts == *" benches "* ]]; then
    echo "== benches"
    left=$((limit - (SECONDS - start)))
    # Cases that no longer fit are skipped, so that those before them are written down. Promises are about CPUs.
    timeout --kill-after=5 "$left" python3 bench/report.py --out "$out" --limit $((left - 45)) -m "not promise" ||
        status=$?
fi
echo "== done after $((SECONDS - start)) s, status $status"
exit $status
