#!/bin/sh
# Install missing launchers for `make test-launch`, if this machine allows it.
set -eu
missing=""
need() {
    command -v "$1" >/dev/null 2>&1 || [ -x "/usr/sbin/$1" ] || missing="$missing $2"
}
need mpirun openmpi-bin
need srun slurm-wlm
need slurmctld slurm-wlm
need munged munge
need ip iproute2
[ -n "$missing" ] || exit 0
if [ "$(id -u)" -ne 0 ] || ! command -v apt-get >/dev/null 2>&1; then
    echo "Not installed:$missing. Automatic installation requires root on Debian or Ubuntu. Tests that need these programs" \
        "are skipped, or fail if STRATAGEM_REQUIRE_LAUNCHERS is set." >&2
    exit 0
fi
echo "Installing$missing ..."
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# shellcheck disable=SC2086 -- split into words on purpose
apt-get install -y -qq --no-install-recommends $missing >/dev/null
