#!/usr/bin/env bash
# Builds a wheel and uses it away from the tree, in an environment without torch: the CPU path of the command line needs none.
# Usage: tests/wheel_smoke.sh PYTHON (an environment that has the build requirements)
set -euo pipefail
python=$1
case $python in /*) ;; *) python=$PWD/$python ;; esac
tree=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

# Without the CUDA module, which takes minutes to compile, is built for the tests already, and is not loaded here.
CMAKE_BUILD_PARALLEL_LEVEL=2 "$python" -m pip wheel --quiet --no-build-isolation --no-deps -w "$work/wheel" \
    --config-settings=cmake.define.MERGEKERNELS_CUDA=OFF "$tree"
"$python" -m venv "$work/venv"
"$work/venv/bin/python" -m pip install --quiet --no-deps "$work"/wheel/mergekernels-*.whl
# The dependencies of the command line alone, in the pinned versions.
grep -E '^(PyYAML|typer|rich)==' "$tree/requirements-dev.txt" >"$work/requirements.txt"
"$work/venv/bin/python" -m pip install --quiet -r "$work/requirements.txt"

cd "$work"
"$work/venv/bin/python" "$tree/tests/wheel_smoke.py"
for pinned in torch numpy triton; do
    if "$work/venv/bin/python" -c "import $pinned" 2>/dev/null; then
        echo "wheel smoke test: $pinned is installed, so nothing was shown" >&2
        exit 1
    fi
done
"$work/venv/bin/mergekernels" run recipe.yml out --quiet
"$work/venv/bin/mergekernels" verify out
"$work/venv/bin/mergekernels" diff out expected
"$work/venv/bin/mergekernels" backends
test -f "$(echo "$work"/venv/lib/python*/site-packages/mergekernels/conformance/golden/kit.json)"
# The line that each process reads when it starts: nothing is imported unless mergekit is, which is not here.
test -f "$(echo "$work"/venv/lib/python*/site-packages/mergekernels_mergekit.pth)"
MERGEKERNELS_MERGEKIT=report "$work/venv/bin/python" -c "import sys; assert 'mergekernels' in sys.modules"
if "$work/venv/bin/python" -c "import sys; sys.exit('mergekernels' in sys.modules)"; then :; else exit 1; fi
if "$work/venv/bin/mergekernels-mergekit" recipe.yml other 2>message; then exit 1; fi
grep -q "mergekit is not installed" message
echo "wheel smoke test: passed"
