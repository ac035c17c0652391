#!/usr/bin/env bash
# What a user of `pip install iterft_lite` gets: build the source package, from it the wheel, install that into a clean environment
# outside the clone, and use it there. The environment sees the dependencies of .venv through a path file: seconds, no download.
#
#   PYTHON=PATH scripts/check_wheel.sh    another Python that has the dependencies (3.12, 3.13)
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-$root/.venv/bin/python}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
pip() { "$python" -m pip --disable-pip-version-check --quiet "$@"; }

echo "wheel: building"
pip install --target "$work/hatch" 'hatchling>=1.27'
(cd "$root" && PYTHONPATH=$work/hatch "$python" -m hatchling build -t sdist -d "$work/dist") > /dev/null
pip wheel --no-deps --wheel-dir "$work/dist" "$work"/dist/iterft_lite-*.tar.gz

echo "wheel: installing beside the dependencies"
"$python" -m venv --without-pip "$work/env"
packages=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
inside=$("$work/env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
echo "$packages" > "$inside/dependencies.pth"
pip --python "$work/env/bin/python" install --no-deps "$work"/dist/iterft_lite-*.whl

export HOME=$work/home ITERFT_CACHE=$work/cache
unset PYTHONPATH
mkdir -p "$HOME" "$work/here"
cd "$work/here"
PATH=$work/env/bin:$PATH
where=$(python -c 'import iterft_lite; print(iterft_lite.__file__)')
case $where in "$work"/env/*) ;; *) echo "wheel: the package that is used is $where" >&2; exit 1 ;; esac

echo "wheel: using it"
shipped=$(ls "$root"/recipes/*.toml | wc -l)
listed=$(python -c 'from iterft_lite.data.recipes import recipe_names; print(len(recipe_names()))')
[ "$listed" -eq "$shipped" ] || { echo "wheel: $listed of $shipped recipes are in it" >&2; exit 1; }
iterft recipes | grep -q nano_sft
iterft traits list | grep -q lucky
iterft plan nano_sft > /dev/null
iterft run nano_sft --plain --set cycles=1 --set seed_rows=8 --set rows=8 --set sample.max_tokens=24 \
  --set evaluate.questions=4 --set evaluate.samples=1 --set evaluate.max_tokens=24
run=$(ls -d runs/*)
iterft report "$run" --json | python -c 'import json, sys; sys.exit(not json.load(sys.stdin)["complete"])'
iterft report "$run" --html page.html
echo "wheel: works"
