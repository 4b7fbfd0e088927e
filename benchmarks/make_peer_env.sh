#!/usr/bin/env bash
# Makes a virtual environment with one or several tools, away from ours: their dependencies differ. Does nothing if it is there already.
# usage: make_peer_env.sh FOLDER [TOOL]      needs Python 3.11 or newer (PYTHON names another than python3)
# TOOL: mergekit (default; also PEFT and TensorLy), fusionbench, sd-mecha
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$1
tool=${2:-mergekit}
case $tool in
    mergekit) requirements=$here/peer-requirements.txt check='from mergekit.scripts import run_yaml' ;;
    fusionbench) requirements=$here/peer-requirements-fusionbench.txt check='import fusion_bench.method' ;;
    sd-mecha) requirements=$here/peer-requirements-sd-mecha.txt check='import sd_mecha' ;;
    *) echo "make_peer_env.sh: no tool '$tool'; mergekit, fusionbench or sd-mecha" >&2; exit 2 ;;
esac
if [ -x "$folder/bin/python" ] && cmp -s "$requirements" "$folder/installed.txt"; then
    exit 0
fi
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
# torch first: the tool alone would choose another version.
"$folder/bin/python" -m pip install --quiet torch==2.13.0
"$folder/bin/python" -m pip install --quiet -r "$requirements"
"$folder/bin/python" -c "$check"
cp "$requirements" "$folder/installed.txt"
