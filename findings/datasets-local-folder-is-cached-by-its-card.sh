#!/usr/bin/env bash
# A local folder with a card that names its files is cached by the words of the card: after the file has changed, the old rows
# come back.
#
# Expected: `load_dataset(FOLDER)` gives what the folder holds, and so it is for a folder without a card: the time of every file
#   is a part of the key of the cache.
# What happens: with `.huggingface.yaml` (or a README.md) that lists `data_files`, the key is the hash of the patterns in it,
#   not of what they find. The rows of the first call are returned for whatever the files hold later, without a word.
# Versions: datasets 5.2.0, Python 3.11; 2026-11-27.
# Source: datasets/load.py, `LocalDatasetModuleFactory.get_module`: `hash = Hasher.hash({"dataset_infos": …,
#   "builder_configs": builder_configs})`, where the configurations of a card hold patterns that are resolved later. They were
#   made so by https://github.com/huggingface/datasets/pull/6493, whose thread sees to the same on the hub; of compressed
#   local files: https://github.com/huggingface/datasets/issues/2956.
# Remedy: a `cache_dir` named by the content of the folder.
# Output seen:
#   without a card: 3 rows, then 1
#   with a card:    3 rows, then 3
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check datasets==5.2.0
export HF_HOME="$folder/home" HF_HUB_OFFLINE=1
"$folder/env/bin/python" - "$folder" <<'PYTHON'
import sys
from pathlib import Path

import datasets

datasets.disable_progress_bars()
CARD = "configs:\n- config_name: default\n  data_files:\n  - split: train\n    path: train.jsonl\n"


def rows(folder: Path, count: int) -> int:
    (folder / "train.jsonl").write_text("".join(f'{{"n": {i}}}\n' for i in range(count)))
    return len(datasets.load_dataset(str(folder), split="train"))


found = []
for name, card in (("without", None), ("with", CARD)):
    folder = Path(sys.argv[1]) / name
    folder.mkdir()
    if card:
        (folder / ".huggingface.yaml").write_text(card)
    found.append((rows(folder, 3), rows(folder, 1)))
    print(f"{name} a card:".ljust(16) + f"{found[-1][0]} rows, then {found[-1][1]}")
raise SystemExit(0 if found == [(3, 1), (3, 3)] else "changed")
PYTHON
