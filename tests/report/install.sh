#!/bin/sh
# Install Chromium for the tests of reports, if it is missing and this machine allows it.
set -eu
if command -v chromium >/dev/null 2>&1 || command -v chromium-browser >/dev/null 2>&1 || command -v google-chrome >/dev/null 2>&1; then
    exit 0
fi
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "Chromium is not installed. Automatic installation requires root on Debian or Ubuntu. Tests that need it are skipped, or" \
        "fail if STRATAGEM_REQUIRE_CHROMIUM is set." >&2
    exit 0
fi
echo "Installing chromium ..."
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
apt-get install -y -qq --no-install-recommends chromium >/dev/null
