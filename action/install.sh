#!/usr/bin/env bash
# Installs safeproj into an environment of its own and tells where the command is.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
. "$here/common.sh"

if [ "$INPUT_INSTALL" = false ]; then
  found=$(command -v safeproj) || fail "install is false, and there is no safeproj on the PATH"
  output command "$found"
  exit
fi

python=$(find_python) || fail "there is no Python ${INPUT_PYTHON:-(python3 or python)}"
environment=$(mktemp -d "$RUNNER_TEMP/safeproj-venv.XXXXXX")
"$python" -m venv "$environment"
bin=$environment/bin
[ -d "$bin" ] || bin=$environment/Scripts # on Windows

pip=("$bin/python" -m pip install --quiet --disable-pip-version-check)
extras=$INPUT_EXTRAS
case ",$extras," in
  *,train,* | *,torch,*) # a check needs no torch
    [ -z "$INPUT_TORCH_INDEX" ] || "${pip[@]}" "--index-url=$INPUT_TORCH_INDEX" 'torch>=2.6'
    ;;
esac
[ -z "$INPUT_REPORT" ] || extras=${extras:+$extras,}report
extras=${extras:+[$extras]}
if [ -n "$INPUT_VERSION" ]; then
  "${pip[@]}" "safeproj$extras==$INPUT_VERSION"
else
  "${pip[@]}" "$(dirname "$here")$extras"
fi
"$bin/safeproj" --version
output command "$bin/safeproj"
