#!/usr/bin/env bash
# Installs Chromium for the tests of the HTML report, where that is possible; they skip elsewhere.
set -euo pipefail

for name in chromium chromium-browser google-chrome; do
    if found=$(command -v "$name"); then
        echo "found $found"
        exit 0
    fi
done

give_up() {
    echo "no browser installed, so tests of the HTML report will skip: $1" >&2
    exit 0
}

command -v apt-get > /dev/null || give_up "there is no apt-get"
if [ "$(id -u)" -eq 0 ]; then
    as_root=(env)
elif sudo -n true 2> /dev/null; then
    as_root=(sudo -n env)
else
    give_up "installing needs root"
fi

# The fonts hold the letters of the formulas: ‖, ᵀ and Δ.
"${as_root[@]}" DEBIAN_FRONTEND=noninteractive apt-get update -qq || give_up "apt-get update failed"
"${as_root[@]}" DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends \
    chromium fonts-dejavu-core > /dev/null || give_up "apt-get install failed"
echo "installed $(command -v chromium)"
