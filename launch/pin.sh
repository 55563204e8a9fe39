#!/usr/bin/env bash
# Renews the pinned versions: the newest that pyproject.toml allows, one file for each Python that is tested.
#   ./launch/pin.sh        then run ./launch/test.sh and ./launch/test.sh --python=python3.12
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/install.sh
show_help launch/pin.sh "$@"

UV=${UV:-.venv/bin/uv}
for minor in 11 12; do
  file=launch/constraints-py3$minor.txt
  {
    echo "# Versions that were tested together on Python 3.$minor; made by ./launch/pin.sh"
    # Names and versions only, no address: whoever installs uses their own index.
    "$UV" pip compile --quiet --no-config --all-extras --python-version="3.$minor" --upgrade \
      --no-header --no-annotate pyproject.toml
  } >"$file.new"
  mv "$file.new" "$file"
done
