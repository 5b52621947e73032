#!/usr/bin/env bash
# Everything that waits for a GPU, in one command: tests, the suite, the tile tuner, the study of
# sparse gradients, a short table.
#
#   bash benchmarks/gpu.sh OUT [WHEELS] [COMMIT]   on a machine with torch, triton, pytest and rich
#   bash benchmarks/gpu.sh OUT --smoke             the same path on a CPU, in three minutes
#
# WHEELS is a folder of wheels of the peers, installed without a network; COMMIT names the sources
# where they were copied without their repository. Each call takes less than nine minutes; run it
# again with the same OUT and it goes on where it stopped. Status: 0 all done, 3 not finished, 1 a
# test failed or one of ours was wrong.
set -u
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh OUT [WHEELS [COMMIT] | --smoke]}")
wheels=${2:-} commit=${3:-}
[ -z "$wheels" ] || [ "$wheels" = --smoke ] || wheels=$(realpath "$wheels")
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
mkdir -p "$out"

if [ "$wheels" = --smoke ]; then
  tests=(tests/test_imports.py) tune=(--smoke)
  bench=(--smoke --device cpu) sparse=(--smoke --device cpu)
else
  "$python" -c 'import torch; assert torch.cuda.is_available(), "torch sees no CUDA device"' || exit 1
  [ -z "$wheels" ] || "$python" -m pip install --quiet --no-index --no-deps "$wheels"/*.whl || exit 1
  tests=(tests/kernels/test_gpu*.py tests/kernels/oracle/test_peer_bugs.py) tune=(--stop-after-s 60)
  # What the targets are about, the most telling shape first.
  bench=(--stop-after-s 240 --limit-s 5 --cell-s 15 --shapes 4096x2048x152064 4096x3584x152064
    16384x2048x152064 1024x2048x152064)
  sparse=(--stop-after-s 75 --cell-s 15 --shape 4096x2048x152064)
fi
hash=$("$python" -c 'from xopd_bench.record import kernel_hash; print(kernel_hash())') || exit 1

status=0
exec 3>&1 # what a step says of itself, wherever its output goes
# step SECONDS COMMAND: at most so long, and never beyond the time of the whole.
step() {
  local most=$1 left=$((530 - SECONDS)) code=3
  shift
  if [ "$left" -gt 20 ]; then
    timeout $((most < left ? most : left)) "$@" && return
    code=$?
  fi
  case $code in
    3 | 124) # of our own commands, and of timeout
      echo "not finished: run again" >&3
      [ "$status" = 1 ] || status=3
      return 3
      ;;
    *)
      echo "failed: $*" >&3
      status=1
      return 1
      ;;
  esac
}

echo "== tests"
for file in "${tests[@]}"; do
  mark="$out/$(basename "$file" .py).$hash"
  if [ -e "$mark.passed" ]; then
    echo "$file passed before"
    continue
  fi
  step 150 "$python" -m pytest -q "$file" >"$mark.txt" 2>&1 && touch "$mark.passed"
  tail -n 1 "$mark.txt"
done

echo "== benchmark"
step 300 "$python" -m benchmarks "${bench[@]}" --commit "$commit" --output "$out/bench.jsonl" \
  >"$out/bench.md"

echo "== tiles"
step 90 "$python" -m benchmarks.tune "${tune[@]}" --commit "$commit" --output "$out/tune.jsonl" \
  2>>"$out/tune.txt"

echo "== sparse gradients"
step 120 "$python" -m benchmarks.sparse run "${sparse[@]}" --commit "$commit" \
  --output "$out/sparse.jsonl" >"$out/sparse.md" 2>>"$out/sparse.txt"

echo "== results"
"$python" -m benchmarks report "$out/bench.jsonl" --short
exit "$status"
