#!/usr/bin/env bash
# Makes the conformance kit anew: installs each tool into an environment of its own under FOLDER and runs it.
# usage: make_kit.sh FOLDER      needs Python 3.11 or newer (PYTHON names another than python3) and the network
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=$1
mkdir -p "$folder"
bash "$here/../../benchmarks/make_peer_env.sh" "$folder/mergekit"
if [ ! -x "$folder/fusionbench/bin/python" ]; then
    "${PYTHON:-python3}" -m venv "$folder/fusionbench"
    "$folder/fusionbench/bin/python" -m pip install --quiet torch==2.13.0
    "$folder/fusionbench/bin/python" -m pip install --quiet fusion-bench==0.2.33
    # Not needed here, and a version that does not fit torch stops transformers.
    "$folder/fusionbench/bin/python" -m pip uninstall --quiet --yes torchvision
fi
for tool in inputs mergekit peft tensorly formula; do
    "$folder/mergekit/bin/python" "$here/make_kit.py" "$tool"
done
"$folder/fusionbench/bin/python" "$here/make_kit.py" fusionbench
