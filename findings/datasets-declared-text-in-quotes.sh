#!/usr/bin/env bash
# JSON lines whose column `text` is declared as string: one row that is a number, and the texts around it come in quotes.
#
# Expected: `load_dataset("json", features=Features({"text": Value("string")}))` gives the texts as they are. The documentation
#   of loading says of `features` that it sets the types of the columns; the type `Json` is said to be applied where mixed types
#   are found. Of a row that is no string one expects an error, or its JSON.
# What happens: the batch (10 MB) in which pyarrow stumbles over the odd row is encoded as JSON and then cast to string, the
#   declared type: every text of that batch begins and ends with `"` and has its line breaks and quotes escaped. Without an
#   error, without a warning, and in the other batches the texts are right. Without `features`, and if the first batch is clean,
#   the same: 5,185 of the 30,000 texts below come in quotes. If the odd row is in the first batch, the column becomes `Json`
#   and all is right.
# Versions: datasets 5.2.0, pyarrow 26.0.1; 2026-11-27.
# Source: datasets/packaged_modules/json/json.py, `_generate_tables`: `json_field_paths` of a batch, which `_cast_table` does not
#   look at once `self.info.features` is set. The type came with https://github.com/huggingface/datasets/pull/8027.
# Remedy: `features=Features({"text": Json()})`, and a check of each value's type.
# Output seen:
#   declared as string: 2 of 2 texts in quotes: '"a \\"word\\""', '12', '"b"'
#   inferred from a clean first batch: string, 5185 of 30001 texts in quotes
#   declared as Json: 0 of 2 texts in quotes
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check datasets==5.2.0 pyarrow==26.0.1
cd "$folder"
HF_HOME="$folder/hf" HF_HUB_OFFLINE=1 "$folder/env/bin/python" - <<'PYTHON'
import json

from datasets import Features, Json, Value, load_dataset


def read(rows, features=None):
    with open("rows.jsonl", "w") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    stream = load_dataset("json", data_files="rows.jsonl", split="train", streaming=True, features=features)
    given = [row["text"] for row in rows]
    found = [row["text"] for row in stream]
    quoted = sum(isinstance(text, str) and got == json.dumps(text) for text, got in zip(given, found, strict=True))
    return stream.features, found, quoted


odd = {"text": 12}
three = [{"text": 'a "word"'}, odd, {"text": "b"}]
_, found, declared = read(three, Features({"text": Value("string")}))
print(f"declared as string: {declared} of 2 texts in quotes:", ", ".join(map(repr, found)))
many = [{"text": f"row {i} " + "x" * 400} for i in range(30000)]
features, found, inferred = read([*many, odd, {"text": "the last"}])
print(f"inferred from a clean first batch: {features['text'].dtype}, {inferred} of 30001 texts in quotes")
_, _, as_json = read(three, Features({"text": Json()}))
print(f"declared as Json: {as_json} of 2 texts in quotes")
if (declared, as_json) != (2, 0) or not 0 < inferred < 30001:
    raise SystemExit("changed: texts are read otherwise")
PYTHON
