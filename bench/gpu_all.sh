#!/usr/bin/env bash
# Everything that wants a GPU, in one command of 8 minutes: are the kernels right, how fast are they, how fast does a
# 7B model train and in how much memory, how fast does it answer, which tiles are the fastest.
#
#   bench/gpu_all.sh                     # or: PYTHON=.venv/bin/python OUT=/tmp/gpu TIME=480 bench/gpu_all.sh
#
# PYTHON: an interpreter with torch, triton and pytest; answers want sentencepiece as well. OUT: where every log and
# result goes. TIME: seconds for all, of which TESTS, PEERS, STEPS and COMMANDS are the most that those parts may take;
# TRAIN, DECODE and TILES are kept for the last three. None stops the next. pytest-xdist, pytest-timeout and hypothesis
# are done without where they are missing; wheels of them in .whl/ are used. The table comes last, with a line for each part.
# Exit code: 1 unless the tests passed. Without a GPU nothing is measured, and that is no failure.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 2

PYTHON=${PYTHON:-python3} OUT=${OUT:-bench/results/gpu} TIME=${TIME:-480}
TESTS=${TESTS:-120} PEERS=${PEERS:-30} STEPS=${STEPS:-30} COMMANDS=${COMMANDS:-90}
TRAIN=${TRAIN:-90} DECODE=${DECODE:-100} TILES=${TILES:-30}
unset TRITON_INTERPRET
export PYTHONUNBUFFERED=1

found=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count())') ||
  { echo "error: $PYTHON has no torch: set PYTHON to an interpreter with torch, triton and pytest" >&2; exit 2; }
if ((found == 0)); then
  echo "no GPU: nothing is measured"
  "$PYTHON" -m bench.bench_kernels && "$PYTHON" -m bench.bench_train_gpu && "$PYTHON" -m bench.bench_decode_gpu
  exit
fi

mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
site=$(mktemp -d)
trap 'rm -rf "$site"' EXIT
summary=() wrong=0

left() { echo $((TIME - SECONDS)); }

part() { # part NAME LIMIT COMMAND...: run it for so many seconds, into a log, and remember what became of it
  local name=$1 limit=$(($2 < $(left) ? $2 : $(left))) begin=$SECONDS status=1 result
  shift 2
  if ((limit < 1)); then # timeout takes 0 for no limit
    echo "no time left" >"$OUT/$name.log"
    result="not run"
  else
    echo "== $name, at most $limit s"
    timeout --kill-after=10 "$limit" "$@" >"$OUT/$name.log" 2>&1
    status=$?
    case $status in
      0) result="ok" ;;
      124 | 137) result="STOPPED" ;;
      *) result="FAILED" ;;
    esac
  fi
  summary+=("$(printf '%-12s %-8s %4d s  %s' "$name" "$result" $((SECONDS - begin)) "$(tail -n 1 "$OUT/$name.log")")")
  return "$status"
}

environment() {
  nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm --format=csv,noheader
  "$PYTHON" - <<'END'
import os, platform
from importlib.metadata import PackageNotFoundError, version

def of(package):
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return f"no {package}"

packages = "torch triton numpy pytest pytest-xdist pytest-timeout hypothesis sentencepiece transformers flash-attn"
packages += " liger-kernel"
print(f"python {platform.python_version()}, {os.cpu_count()} cores, " + ", ".join(map(of, packages.split())))
END
}

have() { "$PYTHON" -c "import importlib.util, sys; sys.exit(importlib.util.find_spec('$1') is None)"; }

if compgen -G ".whl/*.whl" >/dev/null; then
  "$PYTHON" -m pip install -q --no-index --no-deps --target "$site" .whl/*.whl || echo "the wheels in .whl/ do not fit"
  export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
environment 2>&1 | tee "$OUT/environment.log"

# -W default: the machine's Python and torch are seldom the pinned ones; what they warn of is shown, and no failure.
tests=(-v -p no:cacheprovider -W default) parallel=() without=()
if have xdist; then
  cores=$(nproc)
  parallel=(-n $((cores < 16 ? (cores + 1) / 2 : 8)) --dist loadgroup)
fi
if ! have xdist || ! have pytest_timeout; then # their marks and settings are nothing to stumble over
  tests+=(-o addopts="--import-mode=importlib -ra" -W ignore::pytest.PytestConfigWarning)
  tests+=(-W ignore::pytest.PytestUnknownMarkWarning)
fi
if ! have hypothesis; then
  mapfile -t without < <(grep -lE '^(from|import) hypothesis' tests/kernels/on_device/*.py)
  tests+=("${without[@]/#/--ignore=}")
fi

part device_tests "$TESTS" "$PYTHON" -m pytest "${tests[@]}" "${parallel[@]}" -m gpu tests/kernels/on_device || wrong=1
part peers "$PEERS" "$PYTHON" -m pytest "${tests[@]}" tests/kernels/test_peers.py || wrong=1
part graph_steps "$STEPS" "$PYTHON" -m pytest "${tests[@]}" -m gpu tests/llama/test_fixed_step.py || wrong=1
part commands "$COMMANDS" "$PYTHON" -m pytest "${tests[@]}" "${parallel[@]}" -m gpu tests/test_on_gpu.py || wrong=1
limit=$(($(left) - TRAIN - DECODE - TILES))
part kernels "$limit" "$PYTHON" -m bench.bench_kernels --seconds $((limit - 45))
limit=$(($(left) - DECODE - TILES))
part training "$limit" "$PYTHON" -m bench.bench_train_gpu --seconds $((limit - 45)) --line-seconds 45
limit=$(($(left) - TILES))
part decoding "$limit" "$PYTHON" -m bench.bench_decode_gpu --seconds $((limit - 35)) --line-seconds 35
limit=$(($(left) - 5))
heads=(128)
((limit > 160)) && heads+=(64)
part tiles "$limit" "$PYTHON" -m bench.bench_tiles --head "${heads[@]}" --seconds $((limit - 15))
find bench/results -maxdepth 1 -name '*.json' -newer "$OUT/environment.log" -exec cp -t "$OUT" {} +

{
  echo
  cat "$OUT/environment.log"
  grep -hE '(FAILED|ERROR) +tests/|^E  ' "$OUT"/{device_tests,peers,graph_steps,commands}.log
  # Of the table, what is measured against a target or went wrong; the rest is in the log.
  grep -E ' (met|yes|no|no peer)$|failed|not measured|WRONG|launch-bound|^(ceilings|CPU|[0-9]+ of)' "$OUT/kernels.log"
  grep -vhE '^written' "$OUT/training.log" "$OUT/decoding.log"
  grep -E '^    [(#]|^WRONG|NOT admissible' "$OUT/tiles.log"
  printf '%s\n' "${summary[@]}"
  for file in "${without[@]}"; do echo "not run, as there is no hypothesis: $file"; done
  echo "logs and results: $OUT"
} | tee "$OUT/summary.txt"
(cd "$OUT" && tail -n +1 -- *.log >logs.txt && rm -- *.log) # few files, as some machines give few back
exit "$wrong"
