#!/usr/bin/env bash
# Make .venv with everything iterft_lite needs, on Linux, WSL2 or macOS. Called by make; safe to call again.
#
# Without an NVIDIA GPU: a CPU build of torch and of llama.cpp, no CUDA package. With one: the gpu extra and llama.cpp with CUDA.
# On a Mac: torch as it is published, llama.cpp with Metal; training runs on the CPU.
#
#   PYTHON=python3.12 scripts/setup.sh    another Python than the newest one found
#   ITERFT_UV=no scripts/setup.sh         pip, also where uv is installed
set -euo pipefail
cd "$(dirname "$0")/.."

venv=.venv
torch=2.13.0
llama=0.3.36
system=$(uname -s)

say() { echo "setup: $*"; }
fail() { echo "setup: $*" >&2; exit 1; }
has() { command -v "$1" >/dev/null 2>&1; }

# -- the machine

case $system in
  Linux) tools="on Debian and Ubuntu: sudo apt install build-essential cmake git python3-venv" ;;
  Darwin)
    tools="on a Mac: xcode-select --install, then brew install cmake"
    if [ "$(uname -m)" = x86_64 ]; then
      fail "a Mac with Apple silicon is needed: there is no PyTorch 2.11 for Intel Macs (in a terminal under Rosetta: arch -arm64 zsh)"
    fi
    ;;
  MINGW* | MSYS* | CYGWIN*)
    fail "native Windows is not supported (file locks and processes are POSIX ones); in WSL2 (wsl --install) this script works as on Linux" ;;
  *) tools="install cmake, git and a C++ compiler" ;;
esac
if [ "$system" = Darwin ]; then compiler=c++; else compiler=g++; fi
for need in cmake "$compiler"; do has "$need" || fail "$need is missing; $tools"; done

cores() { if [ "$system" = Darwin ]; then sysctl -n hw.ncpu; else nproc; fi; }
checksum() { if has sha256sum; then sha256sum; else shasum -a 256; fi | cut -c 1-16; }
processor() {
  uname -m
  if [ "$system" = Darwin ]; then sysctl -n machdep.cpu.brand_string; else grep -m 1 -E '^(flags|Features)' /proc/cpuinfo || true; fi
}

gpu=no
if has nvidia-smi && nvidia-smi -L 2>/dev/null | grep -q GPU; then gpu=yes; fi

uv=no
if has uv && [ "${ITERFT_UV:-yes}" != no ]; then uv=yes; fi

# -- Python and the environment

new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }
python=${PYTHON:-}
if [ -z "$python" ]; then
  for each in python3 python3.13 python3.12 python3.11; do
    if has "$each" && new_enough "$each"; then python=$each; break; fi
  done
fi
if [ -x "$venv/bin/python" ]; then
  :
elif [ -n "$python" ]; then
  new_enough "$python" || fail "$python is not Python 3.11 or newer"
  if [ "$uv" = yes ]; then
    uv venv --quiet --seed --python "$python" "$venv"
  else
    "$python" -m venv "$venv" || fail "the environment could not be made; $tools"
  fi
elif [ "$uv" = yes ]; then
  say "no Python 3.11 or newer here: uv fetches one"
  uv venv --quiet --seed --python 3.12 "$venv"
else
  found=$(python3 -c 'import platform; print(platform.python_version())' 2>/dev/null || echo none)
  fail "Python 3.11 or newer is needed, found: $found. Either of these helps, then call make again:
  curl -LsSf https://astral.sh/uv/install.sh | sh      uv, which brings a Python of its own
  sudo apt install python3.11 python3.11-venv          Ubuntu 22.04 (universe), beside its Python 3.10"
fi

say "NVIDIA GPU: $gpu; installer: $([ "$uv" = yes ] && echo uv || echo pip); a first set-up takes three to eight minutes on two cores"

# uv does not read pip's configuration: what pip was told of (a folder of wheels, a certificate) is passed on, and written nowhere
pip() { "$venv/bin/python" -m pip --disable-pip-version-check --quiet "$@"; }
setting() { "$venv/bin/python" -m pip config get "$1" 2>/dev/null || true; }
install() {
  # as uv does: what is imported is compiled when it is first imported, a tenth of it all
  if [ "$uv" = no ]; then pip install --no-compile "$@"; return; fi
  local told=() each
  for each in $(setting global.find-links); do told+=(--find-links "$each"); done
  each=$(setting global.cert)
  if [ -n "$each" ]; then export SSL_CERT_FILE="$each"; fi
  uv pip install --quiet --python "$venv/bin/python" ${told[@]+"${told[@]}"} "$@"
}

if [ "$uv" = no ]; then pip install --upgrade pip; fi

# -- llama.cpp

# It is compiled from the source package, beside the downloads, and kept: other clones, and this one made anew, take the wheel
# from the user's cache, where version, options and processor are the same (it is built for the processor it is built on).
#
# The bindings need only libllama and libggml: without the rest it takes three minutes instead of eight. The included file keeps
# the package from switching that rest on again.
no_common=$(pwd)/$venv/no_common.cmake
echo 'set(LLAMA_BUILD_COMMON OFF)' > "$no_common"
options="-DLLAVA_BUILD=OFF"
if [ "$gpu" = yes ]; then
  if has nvcc; then
    options="$options -DGGML_CUDA=on"
  else
    say "no nvcc: llama.cpp will run on the CPU; install the CUDA toolkit and call scripts/setup.sh again" >&2
  fi
fi
if [ "$system" = Darwin ]; then cache=$HOME/Library/Caches; else cache=${XDG_CACHE_HOME:-$HOME/.cache}; fi
cuda=$(if [ "$gpu" = yes ] && has nvcc; then nvcc --version; nvidia-smi --query-gpu=compute_cap --format=csv,noheader; fi 2>/dev/null || true)
key=$( { echo "$llama $options no-common $system $cuda"; processor; } | checksum)
wheels=${ITERFT_CACHE:-$cache/iterft_lite}/wheels/llama_cpp_python-$llama-$key
wheel() { ls "$wheels"/llama_cpp_python-*.whl 2>/dev/null | head -n 1; }
build() {
  local fresh
  fresh=$(mktemp -d)
  CMAKE_BUILD_PARALLEL_LEVEL=$(cores) CMAKE_ARGS="$options -DCMAKE_PROJECT_llama.cpp_INCLUDE=$no_common" \
    pip wheel --no-deps --no-binary llama-cpp-python --wheel-dir "$fresh" "llama-cpp-python==$llama" || return
  # into its place by a rename: a second clone that looks meanwhile sees a whole file or none
  mkdir -p "$wheels"
  for each in "$fresh"/*.whl; do
    cp "$each" "$wheels/.$$.part" && mv "$wheels/.$$.part" "$wheels/$(basename "$each")"
  done
  rm -rf "$fresh"
}
building=
if [ -n "$(wheel)" ]; then
  say "llama.cpp was compiled here before: $(wheel)"
else
  say "compiling llama.cpp (log: $venv/llama.log)"
  build > "$venv/llama.log" 2>&1 &
  building=$!
  trap 'kill $building 2>/dev/null || true' EXIT
fi

# -- packages

extras=dev
if [ "$gpu" = yes ]; then
  extras=gpu,dev
elif [ "$system" != Darwin ]; then
  # pip may know a CPU wheel of its own (a find-links folder); PyTorch's CPU index has one otherwise
  found=$("$venv/bin/python" -m pip install --dry-run --no-deps "torch==$torch" 2>/dev/null || true)
  case $found in
    *"torch-$torch+cpu"*) install "torch==$torch+cpu" ;;
    *"already satisfied: torch=="*) ;;
    *)
      best=
      if [ "$uv" = yes ]; then best=--index-strategy=unsafe-best-match; fi
      install "torch==$torch+cpu" --extra-index-url https://download.pytorch.org/whl/cpu $best
      ;;
  esac
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
say "installing packages"
install -r "$venv/requirements.txt"
if [ -n "$building" ]; then
  if ! wait "$building"; then
    tail -n 20 "$venv/llama.log" >&2
    fail "llama.cpp could not be compiled; its log ends as above (whole: $venv/llama.log)"
  fi
  trap - EXIT
fi
again=--force-reinstall
if [ "$uv" = yes ]; then again=--reinstall; fi
install --no-deps "$again" "$(wheel)"
install diskcache typing_extensions
install --no-deps -e .
touch "$venv/.ready"
say "done. The command is $venv/bin/iterft; after \`. $venv/bin/activate\` it is iterft. Begin with: make run"
