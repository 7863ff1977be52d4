#!/usr/bin/env bash
# Run by Snakemake in the new environment, from the directory where the workflow runs: the project's root.
set -euo pipefail
python -m pip install --quiet --no-deps --editable .
