#!/usr/bin/env bash
# Everything that needs a GPU, in one run of about eight minutes on one H100 or H200:
#
#     scripts/device.sh                 # tests, an 8B pair, the real model with five seeds
#     scripts/device.sh --dry-run       # the same on the processor, very small
#
# Nothing is downloaded: the two packages of lab/real_pair.py are looked for in $WHEELS (their
# directory). PYTHON names the interpreter. A part that fails is said, and the next one runs.
set -u
cd "$(dirname "$0")/.." || exit 2
python=${PYTHON:-python3}
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 PYTHONUNBUFFERED=1

if [ "${1:-}" = "--dry-run" ]; then
    device=cpu size=small evidence=(--quick --jobs 1)
elif "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    device=cuda size=8b evidence=(--seeds 1 2 3 4 5 --jobs 1)
else
    echo "no GPU that torch can use: nothing was run (--dry-run runs it on the processor)"
    exit 0
fi

failed=()
part() { # NAME SECONDS COMMAND...
    local name=$1 limit=$2 begin=$SECONDS
    shift 2
    echo "== $name"
    timeout "$limit" "$@" || failed+=("$name (exit code $?)")
    echo "-- $name: $((SECONDS - begin)) s"
}

part "tests on the device" 150 "$python" -m pytest -q -rs -p no:cacheprovider \
    tests/device tests/engine tests/methods/safe_lora -m cuda
part "an 8B pair" 180 "$python" -m bench.device --size "$size" --device "$device"
if [ -n "${WHEELS:-}" ]; then
    part "a real model" 300 "$python" -m lab.evidence --family smollm2 "${evidence[@]}" \
        --cache "$WHEELS"
else
    echo "== a real model: left out, WHEELS is not set"
fi

echo
echo "parts that failed: ${#failed[@]}"
printf '%s\n' "${failed[@]}"
exit $((${#failed[@]} > 0))
