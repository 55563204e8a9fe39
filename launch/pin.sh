#!/usr/bin/env bash
# Updates the pinned versions to the newest that pyproject.toml allows, in one file for each tested Python.
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
    # Names and versions only, without index addresses, because every user installs from their own index.
    "$UV" pip compile --quiet --no-config --all-extras --python-version="3.$minor" --upgrade \
      --no-header --no-annotate pyproject.toml
  } >"$file.new"
  mv "$file.new" "$file"
done
