#!/usr/bin/env bash
# Builds on a machine with a GPU, runs the GPU tests and benchmarks there, and leaves everything in OUTDIR.
# Usage: benchmarks/gpu_check.sh OUTDIR. Needs python3 with torch (CUDA) and triton; nvcc for the CUDA backend. Its
# steps end after nine minutes at most.
# Exit status: 0 all is well, 1 something failed, 2 wrong usage, 3 there is no GPU.
set -uo pipefail

if [ "$#" -ne 1 ]; then
    echo "usage: $0 OUTDIR" >&2
    exit 2
fi
mkdir -p "$1" || exit 2
out=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
cd "$root" || exit 2
python=${PYTHON:-python3}
failed=0

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>"$out/torch.log"; then
    echo "no GPU: torch is missing, or sees none ($(tail -n 1 "$out/torch.log"))" | tee "$out/summary.txt" >&2
    exit 3
fi

# step NAME SECONDS COMMAND...: runs it with a limit, keeps its output, and goes on after a failure.
step() {
    local name=$1 limit=$2 start=$SECONDS status=0
    shift 2
    timeout "$limit" "$@" >"$out/$name.log" 2>&1 || status=$?
    echo "$name: status $status, $((SECONDS - start)) s" | tee -a "$out/summary.txt"
    if [ "$status" -ne 0 ]; then
        tail -n 15 "$out/$name.log"
        failed=1
    fi
    return "$status"
}

: >"$out/summary.txt"
{
    nvidia-smi
    "$python" -c 'import torch; print(torch.__version__, torch.version.cuda, torch.cuda.get_device_properties(0))'
    "$python" -c 'import triton; print("triton", triton.__version__)'
    command -v nvcc && nvcc --version
} >"$out/machine.txt" 2>&1

# Everything is installed into a folder of its own. Without an index the build tools must be there already.
site=$out/site
trap 'rm -rf "$site"' EXIT
export PYTHONPATH=$site PATH=$site/bin:$PATH CMAKE_BUILD_PARALLEL_LEVEL=8
"$python" -m pip install -q --target "$site" scikit-build-core pybind11 cmake ninja pytest PyYAML typer rich safetensors \
    >"$out/tools.log" 2>&1 || echo "tools: not installed, going on with what is there" | tee -a "$out/summary.txt"
architecture=$("$python" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())')
step build 170 "$python" -m pip install --no-build-isolation --no-deps --target "$site" \
    -C cmake.define.CMAKE_CUDA_ARCHITECTURES="$architecture" . || exit 1

# From tests/, because the folder kernels/ must not be importable as a package.
tests=(test_gpu_devices.py test_cuda_build.py test_cuda_host.py test_cuda_small.py test_cuda_tensor.py)
step tests 125 env -C "$root/tests" "$python" -m pytest -q -rs -p no:cacheprovider --junit-xml="$out/tests.xml" "${tests[@]}"
if command -v compute-sanitizer >/dev/null; then
    step sanitizer 65 env -C "$root/tests" compute-sanitizer --error-exitcode 9 --target-processes all \
        "$python" -m pytest -q -p no:cacheprovider test_gpu_devices.py test_cuda_small.py test_cuda_tensor.py \
        -k "cuda and (sizes or pieces or in_place or test_list or rank_divide or batch_or_the_strides or largest or degenerate or stated_bound) and not repeated and not host"
fi
step bench 85 env -C "$root/benchmarks" "$python" bench_gpu.py --out "$out/gpu.json"
cat "$out/bench.log"
step bench_spectral 55 env -C "$root/benchmarks" "$python" bench_gpu_spectral.py --out "$out/gpu_spectral.json"
cat "$out/bench_spectral.log"
step bench_tensor 39 env -C "$root/benchmarks" "$python" bench_gpu_tensor.py --out "$out/gpu_tensor.json"
cat "$out/bench_tensor.log"
exit "$failed"
