"""Recipes: a stage's frozen dataclass <- TOML file <- `--set a.b=c`; strict, typed, and written back in full.

Knows no recipe: each is declared beside the code that reads it. TOML cannot say "none", so an optional field must
default to None; a rule between fields belongs to the dataclass's __post_init__ (ValueError).
"""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from fathom.errors import RecipeError

Recipe = TypeVar("Recipe")
_WORDS = {int: "an integer", float: "a number", str: "a text", bool: "true or false"}


def load(cls: type[Recipe], path: str | Path | None = None, overrides: Sequence[str] = ()) -> Recipe:
    """A `cls` from its defaults, the TOML file at `path` and then each KEY=VALUE of `overrides`.

    Fields are int, float, str, bool, Literal, `X | None`, `tuple[X, ...]` and dataclasses of these. RecipeError names
    the file or override, the key, its value and what is allowed.
    """
    tree = {} if path is None else _read(Path(path))
    for override in overrides:
        _override(tree, override)
    try:
        return _typed(cls, tree, "")
    except _Fault as fault:
        guilty = [text for text in overrides if f"{fault.key}.".startswith(f"{text.partition('=')[0].strip()}.")]
        source = f"--set {guilty[-1]}: " if guilty else f"{path}: " if path else ""
        raise RecipeError(f"{source}{fault}") from None


def dump(recipe: Any) -> str:
    """The resolved tree as TOML that `load` reads back equal; fields that are None are left out."""
    return "\n".join(_lines(recipe, "")).strip() + "\n"


class _Fault(Exception):
    """What is wrong with the value at a dotted key; `load` adds where the value came from."""

    def __init__(self, key: str, text: str):
        super().__init__(text)
        self.key = key


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"cannot read recipe {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise RecipeError(f"{path} is not valid TOML: {error}") from None


def _override(tree: dict[str, Any], override: str) -> None:
    """Set one KEY=VALUE in the tree; the value is TOML, or a text if it does not parse."""
    key, equals, text = override.partition("=")
    *sections, name = (part.strip() for part in key.split("."))
    if not equals or not name or not all(sections):
        raise RecipeError(f"--set {override}: write it as KEY=VALUE, with dots between section and key")
    for section in sections:
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            raise RecipeError(f"--set {override}: {section} is {tree!r}, not a section")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        parsed = {}
    tree[name] = parsed["value"] if len(parsed) == 1 else text


def _typed(kind: Any, value: Any, key: str) -> Any:
    """`value` as the annotated type of the field at `key`."""
    if types.NoneType in typing.get_args(kind):
        kind = next(option for option in typing.get_args(kind) if option is not types.NoneType)
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _section(kind, value, key)
    if typing.get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_typed(typing.get_args(kind)[0], item, key) for item in value)
    if typing.get_origin(kind) is typing.Literal and value in typing.get_args(kind):
        return value
    if kind is float and type(value) is int and abs(value) < 2**1023:
        return float(value)
    if type(value) is kind:
        return value
    raise _Fault(key, f"{key} is {value!r}; allowed: {_allowed(kind)}")


def _section(cls: type, values: dict[str, Any], key: str) -> Any:
    dotted = f"{key}." if key else ""
    fields = {field.name: field for field in dataclasses.fields(cls) if field.init}
    kinds = typing.get_type_hints(cls)
    for name in values:
        if name not in fields:
            close = difflib.get_close_matches(name, fields, 1)
            hint = f"did you mean {dotted}{close[0]}?" if close else f"allowed: {', '.join(fields)}"
            raise _Fault(dotted + name, f"unknown key {dotted + name!r}; {hint}")
    for name, field in fields.items():
        if name not in values and field.default is field.default_factory is dataclasses.MISSING:
            raise _Fault(dotted + name, f"{dotted}{name} is missing; give it {_allowed(kinds[name])}")
    known = {name: _typed(kinds[name], value, dotted + name) for name, value in values.items()}
    try:
        return cls(**known)
    except ValueError as error:
        raise _Fault(key, f"in {key}: {error}" if key else str(error)) from None


def _allowed(kind: Any) -> str:
    """The type of a field in words."""
    if typing.get_origin(kind) is tuple:
        return f"a list, each {_allowed(typing.get_args(kind)[0])}"
    if typing.get_origin(kind) is typing.Literal:
        return " or ".join(json.dumps(option) for option in typing.get_args(kind))
    if dataclasses.is_dataclass(kind):
        return f"a section with {', '.join(field.name for field in dataclasses.fields(kind) if field.init)}"
    return _WORDS[kind]


def _lines(recipe: Any, key: str) -> list[str]:
    """Plain fields first, since in TOML everything below a [section] line belongs to it."""
    plain, sections = [], []
    for name, value in _present(recipe).items():
        if dataclasses.is_dataclass(value):
            section = f"{key}.{name}" if key else name
            sections += ["", f"[{section}]", *_lines(value, section)]
        else:
            plain.append(f"{name} = {_toml(value)}")
    return plain + sections


def _present(recipe: Any) -> dict[str, Any]:
    values = {field.name: getattr(recipe, field.name) for field in dataclasses.fields(recipe) if field.init}
    return {name: value for name, value in values.items() if value is not None}


def _toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_toml, value))}]"
    if dataclasses.is_dataclass(value):
        return f"{{{', '.join(f'{name} = {_toml(item)}' for name, item in _present(value).items())}}}"
    if isinstance(value, str):  # JSON's escapes are TOML's, but for the one control character that JSON leaves as it is
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value).lower() if isinstance(value, bool) else repr(value)
