"""The grammar of a block of tool calls, in the notation of Lark that llguidance reads: the markup exactly as text/chat.py writes it.

Every declared parameter may be written once, in any order. Those of a strict tool follow their schemas: all that are required, no
others, strings raw, everything else as JSON. Knows no tokenizer but the id of the one special token of the markup.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from re import DOTALL, findall

from fathom.errors import InputError
from fathom.text.templates import CALL_CLOSE, CALL_OPEN, CALLS_CLOSE, CALLS_OPEN, PARAMETER_CLOSE, PARAMETER_OPEN
from fathom.text.tokenizer import DSML

try:
    from llguidance import regex_to_lark
except ImportError:  # optional; grammar.py refuses to compile anything without it
    regex_to_lark = None

MOST_PARAMETERS = 64  # of which it is known which were written: one bit each
BEFORE_CALLS = CALLS_OPEN.split(DSML)[0]  # the ordinary text before the block's first special token
JSON_OPTIONS = {"whitespace_pattern": r"[ \n\r\t]{1,40}"}  # a model that would write blanks without end has to go on

LINE_END, TEXT_ATTRIBUTE, JSON_ATTRIBUTE = (json.dumps(text) for text in ("\n", '"true">', '"false">'))

# TEXT is any value up to the "<" and "/" of the closing tag, but never the marker spelt out in ordinary tokens.
COMMON_RULES = rf"""
TEXT: /(?s:.*)/ & ~/(?s:.*){DSML}(?s:.*)/
ANY_TEXT: TEXT "</"
any_value: {TEXT_ATTRIBUTE} ANY_TEXT text_end | {JSON_ATTRIBUTE} any_json json_end
ANY_NAME: /[^"<>\n｜]{{1,64}}/
any_json: %json {json.dumps({"x-guidance": JSON_OPTIONS})}
"""
CALL_NAMED, PARAMETER_NAMED = '">\n', '" string='  # what follows the names
JSON_KINDS = ("null", "boolean", "number", "array", "object")  # number includes integer
STRING_KEYS = ("pattern", "format", "minLength", "maxLength")
DEFINITIONS = ("$defs", "definitions")
ANNOTATIONS = ("$schema", "$id", "$comment", "title", "description", "default", "examples", "deprecated")
OBJECT_KEYS = ("type", "properties", "required", "additionalProperties", *DEFINITIONS, *ANNOTATIONS)

_LABEL, _BYTE, _GROUP = r"[a-zA-Z0-9]([a-zA-Z0-9\-]{0,61}[a-zA-Z0-9])?", r"(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])", "[0-9a-fA-F]{1,4}"
_DATE = r"[0-9]{4}-(((0[13578]|1[02])-(0[1-9]|[12][0-9]|3[01]))|((0[469]|11)-(0[1-9]|[12][0-9]|30))|02-(0[1-9]|1[0-9]|2[0-8]))"
_TIME = r"([01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](\.[0-9]{1,9})?(Z|[+\-]([01][0-9]|2[0-3]):[0-5][0-9])"
FORMATS = {
    "date": _DATE, "time": _TIME, "date-time": f"{_DATE}T{_TIME}", "hostname": rf"{_LABEL}(\.{_LABEL}){{0,3}}",
    "email": rf"[a-zA-Z0-9_+\-]{{1,32}}(\.[a-zA-Z0-9_+\-]{{1,32}}){{0,3}}@{_LABEL}(\.{_LABEL}){{1,3}}",
    "ipv4": rf"{_BYTE}(\.{_BYTE}){{3}}", "uuid": "[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}",
    "ipv6": f"({_GROUP}:){{7}}{_GROUP}|" + "|".join(
        f"({_GROUP}(:{_GROUP}){{0,{left - 1}}})?::({_GROUP}(:{_GROUP}){{0,{6 - left}}})?" if left else f"::({_GROUP}(:{_GROUP}){{0,6}})?"
        for left in range(7)),
}


@dataclass(frozen=True)
class Tool:
    """A function that an answer may call; `parameters` is the JSON schema of its arguments, which `strict` makes binding."""

    name: str
    parameters: dict
    strict: bool = False


def calls_grammar(tools: Sequence[Tool], dsml: int, several: bool) -> str:
    """Lark text of one call or `several`, from behind the first special token (id `dsml`) to the end of the block.

    InputError names the tool and what of its schema cannot be followed.
    """
    return _Writer(tools, dsml, several).text()


class _Writer:
    """The rules, one after another: rule tool_3 is the fourth tool, rule tool_3_value_0 its first parameter's value."""

    def __init__(self, tools: Sequence[Tool], dsml: int, several: bool):
        self._marker = f" <[{dsml}]> "
        opening = self._markup(CALLS_OPEN.removeprefix(BEFORE_CALLS + DSML) + ">\n")
        names = " | ".join(f"tool_{index}" for index in range(len(tools)))
        json_end, text_end = self._markup(PARAMETER_CLOSE + "\n"), self._markup(PARAMETER_CLOSE.removeprefix("</") + "\n")
        self._rules = [
            f"start: {opening} call{'+' * several} {self._markup(CALLS_CLOSE)}",
            f"call: {self._markup(CALL_OPEN)} ({names}) {self._markup(CALL_CLOSE)} {LINE_END}",
            f"json_end: {json_end}",
            f"text_end: {text_end}",
        ]
        for index, tool in enumerate(tools):
            self._add_tool(f"tool_{index}", tool)

    def text(self) -> str:
        return "\n".join(self._rules) + COMMON_RULES

    def _markup(self, text: str) -> str:
        """Literals and special tokens that spell this text of the format."""
        return self._marker.join(json.dumps(part) if part else "" for part in text.split(DSML))

    def _add_tool(self, rule: str, tool: Tool) -> None:
        _check_name(tool.name, CALL_NAMED, f"tool {tool.name!r}")
        header = self._markup(tool.name + CALL_NAMED)
        names, required = _names(tool)
        if names is None:
            self._rules.append(f"{rule}: {header} ({LINE_END} | {rule}_any+)")
            self._rules.append(f"{rule}_any: {self._markup(PARAMETER_OPEN)} ANY_NAME {self._markup(PARAMETER_NAMED)} any_value")
            return
        bare = [] if required else [LINE_END]  # no arguments: an empty line
        self._rules.append(f"{rule}: {header} ({' | '.join(bare + [f'{rule}_more::0x0'] * bool(names))})")
        if not names:
            return
        choices = []
        for bit, name in enumerate(names):
            _check_name(name, PARAMETER_NAMED, f"tool {tool.name!r}: parameter {name!r}")
            value = self._add_value(f"{rule}_value_{bit}", tool, name) if tool.strict else "any_value"
            opening = self._markup(PARAMETER_OPEN + name + PARAMETER_NAMED)
            choices.append(f"{opening} {value} {rule}_rest::set_bit({bit}) %if bit_clear({bit})")
        self._rules.append(f"{rule}_more::_: " + "\n  | ".join(choices))
        complete = f" %if is_ones([0:{required}])" if required else ""
        self._rules.append(f'{rule}_rest::_: {rule}_more::_ | ""{complete}')

    def _add_value(self, rule: str, tool: Tool, name: str) -> str:
        """The rule of a strict parameter's value, from the quotes of its attribute to the end of its line."""
        where = f"tool {tool.name!r}: parameter {name!r}"
        spelt, values = _spellings(_object(tool)["properties"][name], tool.parameters, where), []
        for index, text in enumerate(spelt.texts):
            self._rules.append(f'{rule.upper()}_{index}: {text} "</"')
            values.append(f"{TEXT_ATTRIBUTE} {rule.upper()}_{index} text_end")
        if spelt.jsons:
            definitions = {key: tool.parameters[key] for key in DEFINITIONS if key in tool.parameters}
            self._rules.append(f"{rule}_json: %json {json.dumps({'anyOf': spelt.jsons, **definitions, 'x-guidance': JSON_OPTIONS})}")
            values.append(f"{JSON_ATTRIBUTE} {rule}_json json_end")
        if not values:
            raise InputError(f"{where}: no value satisfies its schema")
        self._rules.append(f"{rule}: " + " | ".join(values))
        return rule


@dataclass
class _Spelt:
    """How a value may be written: as raw text (terminals' expressions), or as JSON (schemas)."""

    texts: list[str]
    jsons: list[dict]


def _check_name(name: str, end: str, where: str) -> None:
    """Names are written unescaped, so one must not look like what follows it."""
    if end in name or DSML in name or not name:
        raise InputError(f"{where}: such a name cannot be written in the chat format; use letters, digits, _ and -")


def _names(tool: Tool) -> tuple[list[str] | None, int]:
    """Names of the parameters, the required ones first, and how many are required; None: any names."""
    if tool.strict:
        parameters = _object(tool)
        names, required = list(parameters["properties"]), parameters.get("required", [])
        if missing := [name for name in required if name not in names]:
            raise InputError(f"tool {tool.name!r}: required parameter {missing[0]!r} is not among its properties")
        if len(names) > MOST_PARAMETERS:
            raise InputError(f"tool {tool.name!r}: a strict tool takes up to {MOST_PARAMETERS} parameters, got {len(names)}")
        return sorted(names, key=lambda name: name not in required), len(set(required))
    properties = tool.parameters.get("properties")
    open_ended = tool.parameters.get("additionalProperties") or not isinstance(properties, dict) or not properties
    return (None if open_ended or len(properties) > MOST_PARAMETERS else list(properties)), 0


def _object(tool: Tool) -> dict:
    """The schema of a strict tool's arguments, reduced to an object with properties."""
    schema, where = tool.parameters, f"tool {tool.name!r}"
    if "$ref" in schema:
        schema = _lookup(schema["$ref"], schema, where)
    if unknown := [key for key in schema if key not in OBJECT_KEYS]:
        raise InputError(f"{where}: strict parameters cannot use {unknown[0]!r}; use an object with properties")
    if schema.get("type", "object") != "object":
        raise InputError(f"{where}: parameters must be of type object, got {schema['type']!r}")
    return {"properties": {}} | schema


def _spellings(schema: dict | bool, root: dict, where: str, refs: tuple[str, ...] = ()) -> _Spelt:
    """Text and JSON forms of the values of `schema`, whose references are looked up in `root`."""
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    kinds = schema.get("type", ["string", *JSON_KINDS])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if "string" not in kinds:
        return _Spelt([], [schema])
    if "$ref" in schema:
        ref = schema["$ref"]
        if ref in refs:
            raise InputError(f"{where}: {ref} refers to itself")
        return _spellings(_joined(schema, "$ref", _lookup(ref, root, where), where), root, where, (*refs, ref))
    for key in ("anyOf", "oneOf"):  # a oneOf whose options overlap has been refused before
        if key in schema:
            spelt = [_spellings(_joined(schema, key, option, where), root, where, refs) for option in schema[key]]
            return _Spelt([text for one in spelt for text in one.texts], [json for one in spelt for json in one.jsons])
    if "allOf" in schema:
        rest = {key: value for key, value in schema.items() if key != "allOf"}
        for part in schema["allOf"]:
            rest = _joined(rest, None, part, where)
        return _spellings(rest, root, where, refs)
    values = schema.get("enum", [schema["const"]] if "const" in schema else None)
    texts = [_text(schema, values, where)] if values is None or any(isinstance(value, str) for value in values) else []
    kinds = [kind for kind in kinds if kind != "string"]
    others = None if values is None else [value for value in values if not isinstance(value, str)]
    if not kinds or others == []:
        return _Spelt(texts, [])
    plain = {key: value for key, value in schema.items() if key not in (*STRING_KEYS, "enum", "const")}
    return _Spelt(texts, [plain | {"type": kinds} | ({} if others is None else {"enum": others})])


def _joined(schema: dict, without: str | None, other: dict | bool, where: str) -> dict:
    """Both schemas' keywords but `without`; InputError where they say different things about the same one."""
    if isinstance(other, bool):
        other = {} if other else {"enum": []}
    first = {key: value for key, value in schema.items() if key != without and key not in ANNOTATIONS}
    if conflict := [key for key in first if key in other and first[key] != other[key]]:
        raise InputError(f"{where}: {conflict[0]!r} is given twice; a strict parameter needs one")
    return first | other


def _lookup(ref: str, root: dict, where: str) -> dict | bool:
    found = root
    for part in ref.removeprefix("#").split("/")[1:]:
        found = found.get(part.replace("~1", "/").replace("~0", "~")) if isinstance(found, dict) else None
    if not ref.startswith("#/") or not isinstance(found, dict | bool):
        raise InputError(f"{where}: $ref {ref!r} is not a schema of the same document")
    return found


def _text(schema: dict, values: list | None, where: str) -> str:
    """A terminal's expression for the strings that satisfy the schema."""
    terms = ["TEXT"]
    if values is not None:
        terms.append("(" + " | ".join(json.dumps(value) for value in values if isinstance(value, str)) + ")")
    if "pattern" in schema:
        terms.append(_regex(_whole(schema["pattern"])))
    if "format" in schema:
        if schema["format"] not in FORMATS:
            raise InputError(f"{where}: format {schema['format']!r} is not supported; known: {', '.join(sorted(FORMATS))}")
        terms.append(_regex(FORMATS[schema["format"]]))
    if "minLength" in schema or "maxLength" in schema:
        terms.append(f"/(?s:.{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}})/")
    return f"({' & '.join(terms)})"


def _regex(pattern: str) -> str:
    return f"/{regex_to_lark(pattern, 'dw')}/"


def _whole(pattern: str) -> str:
    """The pattern as one of whole strings: JSON schema finds it anywhere unless ^ and $ say otherwise."""
    branches, depth = [""], 0
    for part in findall(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", pattern, DOTALL):
        depth += (part == "(") - (part == ")")
        if part == "|" and depth == 0:
            branches.append("")
        else:
            branches[-1] += part
    return "|".join(_anchored(branch) for branch in branches)


def _anchored(branch: str) -> str:
    ends = branch.endswith("$") and (len(branch) - len(branch[:-1].rstrip("\\"))) % 2 == 1
    start, end = "" if branch.startswith("^") else "(?s:.*)", "" if ends else "(?s:.*)"
    return f"{start}({branch.removeprefix('^')[:-1 if ends else None]}){end}"
