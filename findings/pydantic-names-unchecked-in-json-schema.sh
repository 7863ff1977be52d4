#!/usr/bin/env bash
# A mapping whose names have a pattern: pydantic refuses a name that does not match, the JSON schema of the same model takes it.
#
# Expected: `model_json_schema()` describes what the model accepts, as the section "JSON Schema" of pydantic's documentation
#   says, so that an editor or another service refuses what the model refuses.
# What happens: `dict[Annotated[str, StringConstraints(pattern=…)], int]` becomes `patternProperties` alone. JSON Schema leaves
#   a name that matches no pattern unchecked unless `additionalProperties` is false, which is not written, and the pattern does
#   not go into `propertyNames` either. So the name passes, and its value may be anything.
# Versions: pydantic 2.14.3, jsonschema 4.26.0, Python 3.11; 2026-11-27.
# Source: pydantic/json_schema.py, `GenerateJsonSchema.dict_schema`. Of pydantic 1, which wrote both keys:
#   https://github.com/pydantic/pydantic/issues/11404; `propertyNames` for other keys: pull request 10478 there.
# Remedy: write `additionalProperties: false` beside every `patternProperties` of the schema.
# Output seen:
#   the model: 'a b' is refused (string_pattern_mismatch)
#   its schema: {'patternProperties': {'^[a-z]+$': {'type': 'integer'}}, 'type': 'object'}
#   its schema takes {'sizes': {'a b': 'no number'}}
set -euo pipefail
folder="$(mktemp -d)"
trap 'rm -rf "$folder"' EXIT
"${PYTHON:-python3}" -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check pydantic==2.14.3 jsonschema==4.26.0
"$folder/env/bin/python" - <<'PYTHON'
from typing import Annotated

import jsonschema
import pydantic


class Model(pydantic.BaseModel):
    sizes: dict[Annotated[str, pydantic.StringConstraints(pattern="^[a-z]+$")], int]


try:
    Model.model_validate({"sizes": {"a b": 1}})
    raise SystemExit("changed: the model takes the name")
except pydantic.ValidationError as error:
    print(f"the model: 'a b' is refused ({error.errors()[0]['type']})")
schema = Model.model_json_schema()
print("its schema:", {k: v for k, v in sorted(schema["properties"]["sizes"].items()) if k != "title"})
wrong = {"sizes": {"a b": "no number"}}
jsonschema.Draft202012Validator(schema).validate(wrong)  # an error here: pydantic says it in the schema now
print("its schema takes", wrong)
PYTHON
