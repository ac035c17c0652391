#!/usr/bin/env bash
# Make .venv with everything iterft_lite needs. Called by make; safe to call again.
#
# Without an NVIDIA GPU: a CPU build of torch and of llama.cpp, no CUDA package. With one: the gpu extra and llama.cpp with CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."

python=${PYTHON:-python3}
venv=.venv
torch=2.13.0
llama=0.3.36
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }

for need in cmake g++; do
  command -v "$need" >/dev/null || { echo "setup: $need is missing; on Debian: apt install build-essential cmake git python3-venv" >&2; exit 1; }
done
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "setup: Python 3.11 or newer is needed" >&2; exit 1; }
if [ ! -x "$venv/bin/python" ]; then
  "$python" -m venv "$venv" || { echo "setup: on Debian: apt install python3-venv" >&2; exit 1; }
fi

gpu=no
if command -v nvidia-smi >/dev/null && nvidia-smi -L 2>/dev/null | grep -q GPU; then gpu=yes; fi
echo "setup: NVIDIA GPU: $gpu; a first set-up takes three to eight minutes on two cores"
pip install --upgrade pip

# llama.cpp is compiled from the source package, beside the downloads. The bindings need only libllama and libggml: without the
# rest it takes three minutes instead of eight. The included file keeps the package from switching that rest on again.
no_common=$(pwd)/$venv/no_common.cmake
echo 'set(LLAMA_BUILD_COMMON OFF)' > "$no_common"
arguments="-DLLAVA_BUILD=OFF -DCMAKE_PROJECT_llama.cpp_INCLUDE=$no_common"
if [ "$gpu" = yes ]; then
  if command -v nvcc >/dev/null; then
    arguments="$arguments -DGGML_CUDA=on"
  else
    echo "setup: no nvcc: llama.cpp will run on the CPU; install the CUDA toolkit and call scripts/setup.sh again" >&2
  fi
fi
build() {
  CMAKE_BUILD_PARALLEL_LEVEL=$(nproc) CMAKE_ARGS="$arguments" \
    pip wheel --no-deps --no-binary llama-cpp-python --wheel-dir "$venv/wheels" "llama-cpp-python==$llama"
}
echo "setup: compiling llama.cpp (log: $venv/llama.log)"
build > "$venv/llama.log" 2>&1 &
building=$!

if [ "$gpu" = yes ]; then
  pip install -e '.[gpu,dev]' --no-deps
  extras=gpu,dev
else
  # pip may know a CPU wheel of its own (a find-links folder); PyTorch's CPU index has one otherwise
  found=$("$venv/bin/python" -m pip install --dry-run --no-deps "torch==$torch" 2>/dev/null || true)
  case $found in
    *"torch-$torch+cpu"*) pip install "torch==$torch" ;;
    *) pip install "torch==$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu ;;
  esac
  extras=dev
fi
"$venv/bin/python" - "$extras" > "$venv/requirements.txt" <<'PY'
"""Print what pyproject.toml asks for, but for llama-cpp-python, which is being compiled."""
import sys
import tomllib

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
wanted = list(project["dependencies"])
for extra in sys.argv[1].split(","):
    wanted += project["optional-dependencies"][extra]
print("\n".join(line for line in wanted if not line.startswith("llama-cpp-python")))
PY
echo "setup: installing packages"
pip install -r "$venv/requirements.txt"
if ! wait "$building"; then
  echo "setup: llama.cpp could not be compiled; its log ends:" >&2
  tail -n 20 "$venv/llama.log" >&2
  exit 1
fi
pip install --no-deps --force-reinstall "$venv"/wheels/llama_cpp_python-*.whl
pip install diskcache typing_extensions
pip install --no-deps -e .
rm -rf "$venv/wheels"
touch "$venv/.ready"
echo "setup: done; the command is $venv/bin/iterft"
