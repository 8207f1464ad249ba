#!/usr/bin/env bash
# Checks this repository on a machine with one NVIDIA GPU in at most eight minutes, and measures it.
#
#     bash tools/gpu_check.sh               log in results/gpu_check.log, or in $OUT where it is set
#     bash tools/gpu_check.sh --rehearse    the same on the CPU with small models, log in out/
#
# It needs no file but this repository's and no network: clips, texts and weights are random and are
# made here. Each section of tools/gpu_check.py has its own limit in seconds, and all of them share
# SECONDS_IN_ALL. Lines are written as soon as they are known, so that a run which is cut keeps its
# results. The exit status is 1 if a line says FAILED.
set -u -o pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
rehearse=${1:-}
seconds_in_all=${SECONDS_IN_ALL:-480}
folder=${OUT:-results}
if [ "$rehearse" = --rehearse ]; then
    folder=out
    seconds_in_all=${SECONDS_IN_ALL:-1800}
fi
mkdir -p "$folder"
log=$folder/gpu_check.log
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export PYTHONUNBUFFERED=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-4}   # several sections share the CPU cores

# section LIMIT NAME [ARGUMENT]: one process of tools/gpu_check.py, at most LIMIT seconds
section() {
    local limit=$1 left=$((seconds_in_all - SECONDS))
    shift
    if [ "$rehearse" = --rehearse ]; then limit=$((10 * limit)); fi
    if [ "$left" -lt "$limit" ]; then limit=$left; fi
    if [ "$limit" -lt 10 ]; then
        echo "$*: FAILED: not run, because no time was left"
        return
    fi
    timeout -k 5 "$limit" "$python" tools/gpu_check.py "$@" $rehearse "--scratch=$scratch" 2>&1
    local status=$?
    if [ "$status" -eq 124 ] || [ "$status" -eq 137 ]; then
        echo "$*: FAILED: cut at its limit of $limit s"
    elif [ "$status" -ne 0 ]; then
        echo "$*: FAILED: exit status $status"
    fi
}

checks() {
    echo "commit $(git rev-parse --short HEAD 2>/dev/null || echo unknown), $(date -u +%F)"
    nvidia-smi --query-gpu=name,memory.total,driver_version --format=csv,noheader 2>/dev/null

    # nothing is timed here, so these sections share the GPU
    section 100 parity &
    section 100 training &
    section 110 compile &
    section 110 resume deepmlf_toy &
    section 110 resume mse_toy &
    section 110 resume crosssent_toy &
    wait

    section 60 speed gpt2-large bfloat16
    section 75 speed llama-7b bfloat16
    section 60 compiled gpt2-large
    section 60 compiled llama-7b
    section 60 speed gpt2-large float32
    section 60 speed llama-7b float32
    echo "done after $SECONDS s"
}

checks | tee "$log"
if grep -q FAILED "$log"; then
    echo "gpu_check: $(grep -c FAILED "$log") lines of $log say FAILED"
    exit 1
fi
