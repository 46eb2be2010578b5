#!/usr/bin/env bash
# Makes the alignment file of base and aligned.
set -euo pipefail
. "$(dirname "$0")/common.sh"

command=("$SAFEPROJ" align "--base=$INPUT_BASE" "--aligned=$INPUT_ALIGNED")
command+=("--out=$ALIGNMENT" --overwrite)
append_lines "$INPUT_ALIGN"
"${command[@]}"
