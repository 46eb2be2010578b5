#!/usr/bin/env bash
# Checks the adapters, sets the outputs, and ends with the exit code of the gate: 0 passed, 1 failed,
# 2 undecided.
set -euo pipefail
. "$(dirname "$0")/common.sh"

folder=$(mktemp -d "$RUNNER_TEMP/safeproj-check.XXXXXX")
json=$folder/check.json
sarif=$INPUT_SARIF
if [ -z "$sarif" ] && [ "$INPUT_UPLOAD_SARIF" = true ]; then
  sarif=$folder/check.sarif
fi

# The annotations go to the log; the summary of the step comes with them.
command=("$SAFEPROJ" check --format=github --output=- --format=json "--output=$json")
if [ -n "$INPUT_REPORT" ]; then
  mkdir -p "$(dirname "$INPUT_REPORT")"
  command+=(--format=html "--output=$INPUT_REPORT")
fi
if [ -n "$sarif" ]; then
  mkdir -p "$(dirname "$sarif")"
  command+=(--format=sarif "--output=$sarif")
fi
if [ -n "$MADE_ALIGNMENT" ]; then
  append_option --alignment "$MADE_ALIGNMENT"
else
  append_option --base "$INPUT_BASE"
  append_option --aligned "$INPUT_ALIGNED"
  append_option --alignment "$INPUT_ALIGNMENT"
fi
append_option --safety-module "$INPUT_SAFETY_MODULE"
append_option --original "$INPUT_ORIGINAL"
append_option --policy "$INPUT_POLICY"
append_lines "$INPUT_ARGS"
command+=(--)
append_lines "$INPUT_ADAPTER"

status=0
"${command[@]}" || status=$?

# Without a report nothing was decided, whatever the exit code says: --help would end with 0.
if [ ! -s "$json" ]; then
  json=
  [ "$status" -gt 1 ] || status=2
fi
[ -z "$sarif" ] || [ -s "$sarif" ] || sarif=
case $status in
  0) outcome=passed ;;
  1) outcome=failed ;;
  *) outcome=undecided ;;
esac
output sarif "$sarif"
output json "$json"
output outcome "$outcome"
exit "$status"
