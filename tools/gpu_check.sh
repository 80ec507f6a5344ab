#!/usr/bin/env bash
# On a machine with an NVIDIA device, CuPy and pytest: the tests of the CUDA backend, some of them under compute-sanitizer, then every figure of
# kernels/EXPERIMENTS.md that needs a device. Needs no installation of this project.
set -uo pipefail
cd "$(dirname "$0")/.."
site=$(mktemp -d)
mkdir "$site/forerun"
for name in __init__.py core actors kernels tools; do ln -s "$PWD/$name" "$site/forerun/$name"; done
ln -s "$PWD/tools/client" "$site/forerun/client"
ln -s "$PWD/proto/forerun/v1" "$site/forerun/v1"
export PYTHONPATH="$site:$PWD" PYTHONUNBUFFERED=1
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
tests=(python3 -m pytest -q --cuda -o filterwarnings= -p no:cacheprovider)
"${tests[@]}" -k "not backwards" tests/gpu tests/kernels/test_cuda{,_kernels}.py tests/kernels/test_verify_next.py "$@"
if command -v compute-sanitizer > /dev/null; then
    some="(attention_of_a_chunk or gate_and_up or recurrence_of_large_heads or experts_of_every_type) and not backwards"
    for tool in memcheck racecheck; do compute-sanitizer --tool "$tool" "${tests[@]}" -k "$some" tests/kernels/test_cuda_kernels.py; done
fi
python3 -c "from forerun.tools.cli import main; main()" bench --device cuda --size 0.8B:bf16 --size 4B:bf16 --size 9B:bf16 --size 27B:q8_0 --size 35B-A3B:q8_0
