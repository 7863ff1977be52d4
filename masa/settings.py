"""What a section of settings is: named keys, each with a type, a range, a default and a sentence, in one place.

A section is a pydantic class. From it come the check of YAML and of ``--spec``, the tables of the documentation, the
JSON schema that editors read, and the messages, which name the key, what was expected and what was given.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Annotated, Any

import pydantic
import yaml
from pydantic import AfterValidator, ConfigDict, Field, StringConstraints
from pydantic.fields import FieldInfo

from masa.errors import PLAIN, MasaError, unknown

_WHOLE = r"(?![\s\S])"  # the end; "$" would let a line break pass

FORMS = {
    f"^{PLAIN}{_WHOLE}": "name: letters, digits, '.', '_' and '-', beginning with a letter or digit, without '..'",
    rf"^[^-{{}}*?\x00-\x1f\x7f][^{{}}*?\x00-\x1f\x7f]*{_WHOLE}": "directory: no leading '-', no control characters and "
    "none of { } * ?",
    rf"^[^\x00-\x1f\x7f]+{_WHOLE}": "source: no line breaks or other control characters",
    rf"^[0-9a-f]{{64}}{_WHOLE}": "sha256: 64 hexadecimal digits",
    rf"^[a-z]+{_WHOLE}": "string of projections: small letters",
    rf"^{PLAIN}(/{PLAIN})*{_WHOLE}": "path below the results: names with '/' between them",
    rf"^{PLAIN}/{PLAIN}/seed[0-9]+{_WHOLE}": "run: SCALE/EXPERIMENT/seedN",
}
"""Pattern of text -> what it stands for, in messages."""

Name, Directory, Source, Sha256, Letters, RelativePath, RunId = (
    Annotated[str, StringConstraints(pattern=pattern, min_length=1)] for pattern in FORMS
)
Positive = Annotated[int, Field(ge=1)]
Amount = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
Split = Annotated[float, Field(gt=0, lt=1, json_schema_extra={"$comment": "no split may be empty"})]
"""A fraction of the data."""


def _unique(items: list[Any]) -> list[Any]:
    if len(set(items)) < len(items):
        raise ValueError("names something twice")
    return items


_ONCE = (AfterValidator(_unique), Field(min_length=1, json_schema_extra={"uniqueItems": True}))
Reductions = Annotated[list[Annotated[float, Field(ge=0, lt=100)]], *_ONCE]
"""In percent."""
Seeds = Annotated[list[Annotated[int, Field(ge=0)]], *_ONCE]


def key(sentence: str, default: Any = ..., **limits: Any) -> Any:
    """A key of a section: what it does, its default (none: it must be given), and limits as pydantic names them."""
    return Field(default, description=sentence, **limits)


class Section(pydantic.BaseModel):
    """A mapping of known keys. Nothing is coerced: ``"3"`` is no number, and 3.0 no integer."""

    model_config = ConfigDict(strict=True, extra="forbid", regex_engine="python-re", allow_inf_nan=False)

    @classmethod
    def filled(cls, given: Mapping[str, Any], where: str = "", what: str = "") -> dict[str, Any]:
        """``given`` with every default filled in, in the order of the keys.

        Raises:
            MasaError: as :func:`read`.
        """
        read(cls, given, where, what)
        return {name: given[name] if name in given else copy.copy(default) for name, default in cls.defaults().items()}

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Key -> default; None of keys that must be given."""
        return {n: None if field.is_required() else field.get_default() for n, field in cls.model_fields.items()}

    @classmethod
    def partly(cls) -> type[Section]:
        """The same keys, none of which must be given: for a section that changes some of another one's."""
        return cls.changed(f"{cls.__name__}Changes", **dict.fromkeys(cls.model_fields))

    @classmethod
    def changed(cls, name: str, without: Collection[str] = (), **changes: Any) -> type[Section]:
        """The same keys but for some.

        Args:
            without: keys that are left out.
            changes: key -> its other default, or, of a key more, its type and :func:`key`.
        """
        fields: dict[str, Any] = {}
        for key_, field in cls.model_fields.items():
            if key_ not in without:
                info = _with_default(field, changes[key_]) if key_ in changes else field
                fields[key_] = (field.annotation, info)
        more = {k: v for k, v in changes.items() if k not in cls.model_fields}
        return pydantic.create_model(name, __base__=Section, **fields, **more)


def _with_default(field: FieldInfo, default: Any) -> FieldInfo:
    changed = copy.copy(field)
    changed.default, changed.default_factory = default, None
    return changed


class Open(Section):
    """A section that may hold further keys."""

    model_config = ConfigDict(extra="allow")


@functools.cache
def _adapter(form: Any) -> pydantic.TypeAdapter:
    own = isinstance(form, type) and issubclass(form, Section)
    return pydantic.TypeAdapter(form, config=None if own else Section.model_config)


@functools.cache
def schema_of(form: Any) -> dict[str, Any]:
    """The JSON schema of a section, or of a type made of some, as people would write it."""
    schema = _adapter(form).json_schema()
    return _tidy(schema, schema)


def _tidy(node: Any, schema: Mapping[str, Any]) -> Any:
    """Without pydantic's titles and defaults that the key itself would refuse, and with names that are checked."""
    if isinstance(node, list):
        return [_tidy(item, schema) for item in node]
    if not isinstance(node, dict):
        return node
    tidy = {
        k: {n: _tidy(p, schema) for n, p in v.items()} if k in ("properties", "$defs") else _tidy(v, schema)
        for k, v in node.items()
        if not (k == "title" and isinstance(v, str))
    }
    nullable = any(one.get("type") in ("null", None) for one in alternatives(node, schema))
    if node.get("default", "") is None and not nullable:
        del tidy["default"]
    if "patternProperties" in tidy:
        tidy["additionalProperties"] = False
    return tidy


def read(form: Any, given: Any, where: str = "", what: str = "") -> None:
    """See that data has a form: a section, or a type made of some.

    Args:
        where: what keys are named below, e.g. "training".
        what: what lacks a key, in a message; by default ``where``.

    Raises:
        MasaError: the first key that is not what it should be.
    """
    what = what or where or "the configuration"
    try:
        path = _no_text(given)
    except RecursionError as error:
        raise MasaError(f"{what} nests too deeply.") from error
    if path is not None:
        at = _shown(where, path[:-1]) or what
        raise MasaError(f"{at}: keys must be text, got {path[-1]!r}. Write it in quotes, or give it a name.")
    try:
        _adapter(form).validate_python(given)
    except pydantic.ValidationError as error:
        raise _first(error.errors(include_url=False), schema_of(form), given, where, what) from None


def typed(form: Any, given: Any) -> Any:
    """Data as a command line gives it, with every text that stands where its key takes none as what it says.

    Snakemake's ``--config 'training={threads: 1}'`` arrives as ``{"training": {"threads": "1"}}``. Text that is not of
    the key's type stays text, for :func:`read` to refuse.
    """
    return _typed([], given, schema_of(form))


def _typed(path: list[Any], given: Any, schema: dict[str, Any]) -> Any:
    if isinstance(given, Mapping):
        return {key_: _typed([*path, key_], value, schema) for key_, value in given.items()}
    if isinstance(given, list):
        return [_typed([*path, i], value, schema) for i, value in enumerate(given)]
    if not isinstance(given, str):
        return given
    kinds = list(alternatives(_node(path, schema), schema))
    fixed = [one for one in kinds if "enum" in one or "const" in one]
    if any(given in one.get("enum", [one.get("const")]) for one in fixed):
        return given
    types = {one.get("type") for one in kinds} - {None}
    if not types:  # of free form, such as a method's options
        with contextlib.suppress(yaml.YAMLError):
            return yaml.safe_load(given)
    if "null" in types and given.lower() in ("null", "~", ""):
        return None
    if any(one.get("type") == "string" for one in kinds if one not in fixed):
        return given
    for type_, made in (("integer", int), ("number", float)):
        with contextlib.suppress(ValueError):
            if type_ in types or (type_ == "integer" and "number" in types):
                return made(given)
    if "boolean" in types and given.lower() in ("true", "false"):
        return given.lower() == "true"
    return given


def _no_text(given: Any) -> list[Any] | None:
    """The place of the first key that is no text."""
    inner = given.items() if isinstance(given, Mapping) else enumerate(given) if isinstance(given, list) else ()
    for key_, value in inner:
        if isinstance(given, Mapping) and not isinstance(key_, str):
            return [key_]
        if (below := _no_text(value)) is not None:
            return [key_, *below]
    return None


def _shown(where: str, path: Iterable[Any]) -> str:
    """A place in words: "training.tokens"."""
    below = ".".join(map(str, path))
    return f"{where}{'.' * where[-1:].isalnum()}{below}" if below else where.rstrip(": ")


def resolved(node: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """A node of a schema with what it refers to."""
    if "$ref" in node:
        return resolved(schema["$defs"][node["$ref"].rsplit("/", 1)[-1]], schema) | {
            k: v for k, v in node.items() if k != "$ref"
        }
    return dict(node)


def alternatives(node: Mapping[str, Any], schema: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """What a node may be, ``anyOf`` by ``anyOf``; null comes first."""
    node = resolved(node, schema)
    several = node.get("anyOf") or node.get("oneOf") or [node]
    for one in sorted(several, key=lambda n: n.get("type") != "null"):
        yield from alternatives(one, schema) if one is not node else [node]


def expected(node: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """What a node wants, in words: "null or an integer of at least 1"."""
    return " or ".join(dict.fromkeys(_expected(one, schema) for one in alternatives(node, schema)))


ANYTHING = "anything"
_TYPES = {"integer": "an integer", "number": "a number", "boolean": "true or false", "object": "a mapping"}
_TYPES |= {"string": "text", "array": "a list", "null": "null"}
_LIMITS = {"minimum": "at least", "exclusiveMinimum": "more than", "maximum": "at most"}
_LIMITS |= {"exclusiveMaximum": "less than", "minItems": "at least", "maxItems": "at most", "minLength": "at least"}
_LIMITS |= {"minProperties": "at least"}
_UNITS = {"string": " characters", "array": " items", "object": " keys"}


def _expected(node: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    if "enum" in node or "const" in node:
        return f"one of {', '.join(map(str, node.get('enum', [node.get('const')])))}"
    if node.get("pattern"):
        return f"of the form of a {FORMS[node['pattern']]}"
    words, unit = _TYPES.get(node.get("type", ""), ANYTHING), _UNITS.get(node.get("type", ""), "")
    limits = [f"{said} {node[limit]:g}{unit}" for limit, said in _LIMITS.items() if limit in node]
    if "minItems" in node and node.get("minItems") == node.get("maxItems"):
        limits = [f"{node['minItems']} items"]
    words += f" of {' and '.join(limits)}" if limits else ""
    if node.get("items") and (each := expected(node["items"], schema)) != ANYTHING:
        words += f", each {each}"
    words += ", none of them twice" if node.get("uniqueItems") else ""
    return words + (f": {node['$comment']}" if "$comment" in node else "")


def _first(errors: list[Any], schema: dict[str, Any], given: Any, where: str, what: str) -> MasaError:
    """One sentence for the first key that is wrong, with did-you-mean for keys and values."""
    placed = [(error, _path(error["loc"], given)) for error in errors]
    first, path = min(placed, key=lambda p: ("[key]" not in p[0]["loc"], len(p[1]), str(p[0]["loc"])))
    inside = [error for error, at in placed if at[: len(path)] == path and len(at) > len(path)]
    if inside and first["type"].endswith("_type"):  # of several types that fit its own, what is wrong in the value
        return _first(inside, schema, given, where, what)
    node, value = _node(path, schema), _at(path, given)
    shown, around = _shown(where, path) or what, _shown(where, path[:-1]) or what
    said = repr(value) if len(repr(value)) < 200 else f"{repr(value)[:200]} …"
    if "[key]" in first["loc"]:
        names = next((n["patternProperties"] for n in alternatives(_node(path[:-1], schema), schema)), {})
        form = _expected({"pattern": next(iter(names))}, schema)
        return MasaError(f"{around}: the name {path[-1]!r} does not match; it must be {form}.")
    if first["type"] == "extra_forbidden":
        known = _properties(_node(path[:-1], schema), _at(path[:-1], given), schema)
        return unknown(f"{around}: key", path[-1], known)
    if first["type"] == "missing":
        lacks = [error["loc"][-1] for error, at in placed if error["type"] == "missing" and at == path]
        return MasaError(f"{shown if path else what} needs {', '.join(lacks)}.")
    if first["type"].startswith("union_tag"):
        tag = first["ctx"]["discriminator"].strip("'")
        tags = re.findall(r"'(\w+)'", first["ctx"].get("expected_tags", ""))
        return unknown(f"{shown}.{tag}: value", value[tag], tags) if tags else MasaError(f"{shown} needs {tag}.")
    if first["type"] == "value_error":
        return MasaError(f"{shown}: {said} {first['ctx']['error']}.")
    options = [str(o) for one in alternatives(node, schema) for o in one.get("enum", [])]
    if isinstance(value, str) and options:
        return unknown(f"{shown}: value", value, options)
    if first["type"] in ("string_pattern_mismatch", "string_too_short"):
        return MasaError(f"{shown}: {said} does not match; it must be {expected(node, schema)}.")
    finite = " that is finite" * (isinstance(value, int | float) and not -1e308 < value < 1e308)
    return MasaError(f"{shown} must be {expected(node, schema)}{finite}, got {said}.")


def _at(path: list[Any], given: Any) -> Any:
    return functools.reduce(lambda inside, part: inside[part], path, given)


def _properties(node: Mapping[str, Any], given: Mapping[str, Any], schema: Mapping[str, Any]) -> dict[str, Any]:
    """Known keys; of several sections those of the one whose fixed keys ``given`` has."""
    found = [one["properties"] for one in alternatives(node, schema) if "properties" in one]
    fits = [p for p in found if all(given.get(k) == n["const"] for k, n in p.items() if "const" in n)]
    return {k: n for properties in fits or found for k, n in properties.items()}


def _path(loc: tuple[Any, ...], given: Any) -> list[Any]:
    """The keys of an error's place that exist in the data; pydantic also names members of unions."""
    path: list[Any] = []
    for part in loc:
        inside = isinstance(given, Mapping) and part in given
        if inside or (isinstance(given, list) and isinstance(part, int) and part < len(given)):
            given = given[part]
            path.append(part)
    return path


def _node(path: list[Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The node of a schema that describes what stands at a path."""
    node: dict[str, Any] = schema
    for part in path:
        inner: Any = None
        for one in alternatives(node, schema):
            inner = one.get("properties", {}).get(part) or inner
            inner = inner or (one.get("items") if isinstance(part, int) else None)
            further = one.get("additionalProperties")
            inner = inner or (further if isinstance(further, dict) else None)
            for pattern, matched in one.get("patternProperties", {}).items():
                inner = inner or (matched if re.search(pattern, str(part)) else None)
        node = inner or {}
    found = [one for one in alternatives(node, schema) if one.get("type") != "null"]
    return found[0] if len(found) == 1 and "properties" in found[0] else resolved(node, schema)
