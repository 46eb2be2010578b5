# What the steps of action.yml share. Also for the bash 3.2 of macOS.
# shellcheck shell=bash

NEWLINE=$'\n'
RETURN=$'\r'

# Say why the action cannot go on, as an annotation, and end as the gate does when undecided.
fail() {
  printf '::error title=safeproj::%s\n' "${1//[$NEWLINE$RETURN]/ }"
  exit 2
}

# Set an output of the step: NAME VALUE. More than one line could set others as well.
output() {
  case $2 in
    *"$NEWLINE"* | *"$RETURN"*) fail "$1 must be one line" ;;
  esac
  printf '%s=%s\n' "$1" "$2" >>"$GITHUB_OUTPUT"
}

# Print the Python that the input names, or the first that there is.
find_python() {
  local name
  for name in ${INPUT_PYTHON:+"$INPUT_PYTHON"} python3 python; do
    if command -v "$name" >/dev/null; then
      printf '%s\n' "$name"
      return
    fi
    [ -z "$INPUT_PYTHON" ] || return 1
  done
  return 1
}

# Append the lines of a text to the array `command`, without spaces around them and empty ones.
append_lines() {
  local line
  while IFS=$' \t' read -r line || [ -n "$line" ]; do
    [ -z "$line" ] || command+=("$line")
  done <<<"${1//$RETURN/}"
}

# Append OPTION=VALUE to the array `command` if there is a value. The = keeps a value that begins
# with a dash from being an option itself.
append_option() {
  [ -z "$2" ] || command+=("$1=$2")
}
