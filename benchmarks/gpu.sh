#!/usr/bin/env bash
# benchmarks/gpu.sh [--dry] [--save DIR]: builds the GPU kernels, tests them and measures them on a machine with a GPU;
# no network, under 8 minutes. It ends with a short table; README.md beside this says what the rows mean.
#
#   --dry        the same stages without a GPU, as far as they go: GPU tests are collected and skipped, Triton runs in its
#                interpreter, the benchmark is tiny and on the host's clock. It measures nothing and saves nothing.
#   --save DIR   where the rows go, as <date>-<device>.jsonl (default: benchmarks/results; with --dry: nowhere)
#
# Exits with 1 if the build, a test or a sanitizer failed, never because of a time. A stage that fails or hangs does not
# stop those behind it. PYTHON: the interpreter (python3). OUT: a folder that gets rows and logs too. PYGUIDE_COMMIT:
# what the tree is, where its .git did not come along.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 2

dry="" save=""
while (($#)); do
    case $1 in
    --dry) dry=yes ;;
    --save) save=${2:?gpu.sh: --save needs a folder} && shift ;;
    *)
        echo "gpu.sh: unknown argument $1; expected --dry or --save DIR" >&2
        exit 2
        ;;
    esac
    shift
done
[[ -n $dry ]] || save=${save:-benchmarks/results}

PYTHON=${PYTHON:-python3}
LIMIT=${PYGUIDE_GPU_LIMIT:-465} # seconds, all stages together
logs=$(mktemp -d) || exit 2
trap 'rm -rf "$logs"' EXIT
rows=$logs/rows.jsonl stages=$logs/stages.tsv failed=""
touch "$rows" "$stages"
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" PYTHONUNBUFFERED=1
cores=$(nproc)
if [[ -n $dry ]]; then # the CPU alone, and few of its threads: it may be shared
    export CUDA_VISIBLE_DEVICES="" OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
fi
SECONDS=0

# note NAME HOW SECONDS: how a stage ended, here and in the table
note() {
    printf '%s\t%s\t%s\n' "$1" "$2" "$3" >>"$stages"
    printf -- '-- %s: %s, %s s\n' "$1" "$2" "$3"
}

# stage NAME SECONDS COMMAND...: runs it, its output in a log; not longer than SECONDS, nor than what is left of LIMIT
stage() {
    local name=$1 limit=$2 log=$logs/$1.log began=$SECONDS left=$((LIMIT - SECONDS)) status=0
    shift 2
    ((limit <= left)) || limit=$left
    if ((limit < 1)); then
        : >"$log"
        note "$name" "FAILED: the time was up" 0
        return 124
    fi
    timeout --kill-after=5 "$limit" "$@" >"$log" 2>&1 || status=$?
    case $status in
    0) note "$name" ok $((SECONDS - began)) ;;
    124 | 137) note "$name" "FAILED: ended after $limit s" $((SECONDS - began)) ;;
    *) note "$name" "FAILED: status $status" $((SECONDS - began)) ;;
    esac
    ((status == 0)) || tail -n 25 "$log"
    return $status
}

# together FUNCTION NAME...: FUNCTION NAME for each name, all at once where there are cores for it; fails if one does
together() {
    local function=$1 name status=0 pids=()
    shift
    for name in "$@"; do
        if ((cores >= 8)); then
            "$function" "$name" >"$logs/$name.said" 2>&1 &
            pids+=("$!")
        else
            "$function" "$name" || status=1
        fi
    done
    for pid in "${pids[@]}"; do wait "$pid" || status=1; done
    ((${#pids[@]} == 0)) || for name in "$@"; do cat "$logs/$name.said"; done
    return $status
}

# ---- the machine, and the build for its GPU --------------------------------------------------------------------------
run() { stage "$1" "$2" "$PYTHON" "${@:3}"; }

run machine 90 -m pyguide.bench.gpu --machine || failed=yes
cat "$logs/machine.log"
if [[ -n $dry ]]; then
    note build "not rehearsed: the tree as it is" 0
elif ! grep -q '^arch ' "$logs/machine.log"; then
    echo "gpu.sh: no GPU that torch can use; --dry rehearses without one" >&2
    exit 1
else
    command -v nvcc >/dev/null || export PATH="$PATH:/usr/local/cuda/bin"
    PYGUIDE_CUDA_ARCHS=$(sed -n 's/^arch //p' "$logs/machine.log")
    export PYGUIDE_NATIVE=1 PYGUIDE_CUDA=1 PYGUIDE_CUDA_ARCHS
    run build 150 setup.py build_ext --inplace || failed=yes
    run env 60 -m pyguide.env || failed=yes
    sed -n '/^backends/,$p' "$logs/env.log"
fi

# ---- tests: a process for each file, so that one that hangs or loses the device takes no other with it ---------------
test_file() {
    local spread=() # files whose kernels Triton compiles one by one
    if [[ -n $xdist && $1 =~ triton|sampler|graph ]]; then spread=(-n 3); fi
    stage "$1" 150 "$PYTHON" -m pytest -q -p no:cacheprovider --durations=3 "${spread[@]}" "tests/gpu/$1.py"
}
if [[ -n $dry ]]; then
    run tests 120 -m pytest -q -p no:cacheprovider tests/gpu || failed=yes
else
    export PYGUIDE_NEEDS_GPU=1 # a test that finds no GPU fails instead of being skipped
    files=(tests/gpu/test_*.py) xdist=""
    if ((cores >= 8)) && "$PYTHON" -c 'import xdist' 2>/dev/null; then xdist=yes; fi
    together test_file $(basename -s .py "${files[@]}") || failed=yes
fi
sed -n '/ in [0-9.]*s/p' "$logs"/test*.log

# ---- compute-sanitizer on small cases of every path -------------------------------------------------------------------
sanitizer=$(command -v compute-sanitizer || compgen -G '/usr/local/cuda*/bin/compute-sanitizer' | tail -n 1)
sanitize() {
    local options=(--tool "$1" --error-exitcode 99 --print-limit 20 --target-processes application-only) graphs=()
    # torch's pool would hide what lies outside of a tensor; without it there is no capture
    if [[ $1 == racecheck ]]; then graphs=(--graphs); else local -x PYTORCH_NO_CUDA_MEMORY_CACHING=1; fi
    stage "$1" 100 "$sanitizer" "${options[@]}" "$PYTHON" tests/gpu/sanitize.py "${graphs[@]}"
}
# unproven TOOL: whether it failed for want of a device that it knows, or of time, and found nothing
unproven() {
    grep -q '^=========.*not supported' "$logs/$1.log" && return
    grep -Eq "^$1"$'\tFAILED: (ended|the time)' "$stages" && ! grep -Eq '^========= .*(Invalid|Uninit|Race|hazard)' "$logs/$1.log"
}
tools="memcheck racecheck initcheck"
if [[ -n $dry ]]; then
    TRITON_INTERPRET=1 run sanitizer 60 tests/gpu/sanitize.py --dry || failed=yes
elif [[ -z $sanitizer ]]; then
    note sanitizer "not available: no compute-sanitizer" 0
elif ! together sanitize $tools; then
    for tool in $tools; do
        grep -q "^$tool"$'\tFAILED' "$stages" || continue
        if unproven "$tool"; then
            sed -i "/^$tool\t/s/FAILED/not available/" "$stages"
        else
            failed=yes
        fi
    done
fi

# ---- the benchmark ----------------------------------------------------------------------------------------------------
if [[ -n $dry ]]; then
    run guidance 120 -m pyguide.bench --suite guidance --dry || failed=yes # its rows are not the table's
    TRITON_INTERPRET=1 run benchmark 90 -m pyguide.bench --suite gpu --dry --json "$rows"
else # it stops by itself; what it has measured when it is stopped counts
    left=$((LIMIT - SECONDS - 15))
    run benchmark $((left > 265 ? 265 : left)) -m pyguide.bench --device cuda --suite gpu --suite guidance \
        --budget $((left > 225 ? 195 : left > 50 ? left - 40 : 10)) --json "$rows"
fi
status=$?
((status == 0 || status == 124 || status == 137)) || failed=yes # wrong results count, slow ones do not
tail -n 1 "$logs/benchmark.log"                                  # its notes: what failed, what was left out

# ---- what is kept -----------------------------------------------------------------------------------------------------
if [[ -n $save && -s $rows ]]; then
    device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | head -n 1)
    device=$(tr -cs a-z0-9 - <<<"${device,,}")
    device=${device%-} file=$save/$(date -u +%F)-${device:-gpu}.jsonl
    mkdir -p "$save" && cat "$rows" >>"$file" && echo "rows: $file"
fi
if [[ -n ${OUT:-} ]] && mkdir -p "$OUT"; then
    cp "$rows" "$OUT/gpu-rows.jsonl"
    cp "$stages" "$OUT/gpu-stages.tsv"
    tail -n +1 "$logs"/*.log >"$OUT/gpu.log"
fi

echo
timeout 60 "$PYTHON" -m pyguide.bench.gpu --rows "$rows" --stages "$stages" || cat "$stages"
echo "${dry:+rehearsal, }${failed:+FAILED, }$SECONDS s in all"
[[ -z $failed ]]
