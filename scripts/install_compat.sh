#!/usr/bin/env bash
# install_compat.sh oldest|newest: makes .venv-oldest (exactly oldest.txt) or .venv-newest (the newest releases that
# pyproject.toml allows, today), each with tropd and what the tests marked `compat` need.
#
# torch comes first and stays: its newest release has no build for CPUs, and comes with several GB for GPUs.
set -euo pipefail
cd "$(dirname "$0")/.."

set=$1
venv=.venv-$set
export PIP_DISABLE_PIP_VERSION_CHECK=1
pip() { "$venv/bin/python" -m pip "$@"; }

[[ -x $venv/bin/python ]] || "${PYTHON:-python3}" -m venv "$venv"
torch=$(grep '^torch==' constraints.txt)
case $set in
    oldest)
        if [[ oldest.txt -nt $venv/.installed || pyproject.toml -nt $venv/.installed ]]; then
            echo "Installing the oldest packages into $venv (a few minutes)"
            pip install -qq -c oldest.txt "$torch" -e '.[compat]'
        fi
        ;;
    newest)
        echo "Installing the newest packages into $venv (a few minutes the first time)"
        pip install -qq "$torch"
        pip install -qq --upgrade --upgrade-strategy eager -c <(echo "$torch") -e '.[compat]'
        ;;
    *)
        echo "install_compat.sh oldest|newest, not $set" >&2
        exit 2
        ;;
esac
touch "$venv/.installed"
