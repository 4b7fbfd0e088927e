#!/usr/bin/env bash
# Makes a virtual environment with mergekit, away from ours: their dependencies differ. Does nothing if it is there already.
# usage: make_peer_env.sh FOLDER      needs Python 3.11 or newer (PYTHON names another than python3)
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$1
if [ -x "$folder/bin/mergekit-yaml" ] && cmp -s "$here/peer-requirements.txt" "$folder/installed.txt"; then
    exit 0
fi
[ -x "$folder/bin/python" ] || "${PYTHON:-python3}" -m venv "$folder"
# torch first: mergekit alone would choose another version.
"$folder/bin/python" -m pip install --quiet torch==2.13.0
"$folder/bin/python" -m pip install --quiet -r "$here/peer-requirements.txt"
"$folder/bin/mergekit-yaml" --help >/dev/null
cp "$here/peer-requirements.txt" "$folder/installed.txt"
