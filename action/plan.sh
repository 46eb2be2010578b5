#!/usr/bin/env bash
# Tells where the alignment file goes, and under which key it is kept between runs, if it is.
set -euo pipefail
here=$(dirname "$0")
. "$here/common.sh"

if [ -z "$INPUT_BASE" ] || [ -z "$INPUT_ALIGNED" ]; then
  fail "align makes a file of base and aligned; give both"
fi
if [ -n "$INPUT_ALIGNMENT$INPUT_SAFETY_MODULE" ]; then
  fail "align makes a file, and alignment or safety-module names one; give one of them"
fi

key=
if [ "$INPUT_CACHE" != false ]; then
  python=$(find_python) || fail "there is no Python ${INPUT_PYTHON:-(python3 or python)}"
  version=$("$SAFEPROJ" --version)
  key=$("$python" "$here/key.py" "$version" "$INPUT_BASE" "$INPUT_ALIGNED" "$INPUT_ALIGN")
fi
if [ -n "$key" ]; then
  folder=$RUNNER_TEMP/$key
  mkdir -p "$folder"
else
  folder=$(mktemp -d "$RUNNER_TEMP/safeproj-alignment.XXXXXX")
fi
output key "$key"
output folder "$folder"
output file "$folder/model.safealign.safetensors"
