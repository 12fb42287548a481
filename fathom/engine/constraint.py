"""Constraints for what users ask for: JSON, a JSON schema, a regex or tool calls, written as the text of a grammar.

Nothing here is compiled; engine/grammar.py does that, maybe in another process.
"""

import json
from collections.abc import Callable, Sequence

from fathom.engine.grammar import Constraint, LLMatcher, Prose, one_line, require_package
from fathom.engine.tool_grammar import JSON_OPTIONS, Tool, calls_grammar
from fathom.errors import InputError
from fathom.text.tokenizer import DSML, Tokenizer

LONGEST_SCHEMA, LONGEST_REGEX = 1 << 16, 1 << 12  # characters; the schema's as JSON
DEEPEST_SCHEMA = 64
MOST_TOOLS = 128


class Grammars:
    """Writes constraints, and has each grammar looked at by `check(grammar, where)`, which raises InputError for one that cannot be compiled.

    With `thinking` an answer begins inside its reasoning: free text up to </think>, then the grammar. No special token is allowed
    but those of the format. All methods raise InputError for what is too large, broken or not supported.
    """

    def __init__(self, tokenizer: Tokenizer, check: Callable[[str, str], object]):
        require_package()
        self._dsml, self._check = tokenizer.special_ids[DSML], check

    def json_schema(self, schema: dict, thinking: bool) -> Constraint:
        """JSON that satisfies a schema; properties in the schema's order."""
        return self._constraint(_schema_grammar(schema, "json schema"), "json schema", thinking)

    def json_object(self, thinking: bool) -> Constraint:
        """Any JSON object."""
        return self.json_schema({"type": "object"}, thinking)

    def regex(self, pattern: str, thinking: bool) -> Constraint:
        """Text that a regex (of Rust's syntax, without look-around) matches as a whole."""
        if len(pattern) > LONGEST_REGEX:
            raise InputError(f"regex: {len(pattern)} characters; allowed: up to {LONGEST_REGEX}")
        if not pattern.isprintable() and any("\ud800" <= letter <= "\udfff" for letter in pattern):
            raise InputError("regex: it holds a lone surrogate, which no text can; remove it")
        return self._constraint(LLMatcher.grammar_from_regex(pattern), "regex", thinking)

    def tools(self, tools: Sequence[Tool], choice: str, thinking: bool) -> Constraint:
        """Content, then tool calls if the model likes (`choice` auto), at least one (required), or one of the tool so named."""
        if not 0 < len(tools) <= MOST_TOOLS or len({tool.name for tool in tools}) < len(tools):
            raise InputError(f"tools: allowed are 1 to {MOST_TOOLS} with different names")
        named = [tool for tool in tools if tool.name == choice] if choice not in ("auto", "required") else list(tools)
        if not named:
            raise InputError(f"tool_choice: no tool is called {choice!r}; known: {', '.join(tool.name for tool in tools)}"[:300])
        for tool in named:
            where = f"tool {tool.name!r}"
            if not isinstance(tool.parameters, dict):
                raise InputError(f"{where}: parameters must be a JSON schema, got {type(tool.parameters).__name__}")
            if tool.strict:  # what llguidance refuses in a schema is refused with its words
                self._check(_schema_grammar(tool.parameters, where), where)
        text = calls_grammar(named, self._dsml, several=choice in ("auto", "required"))
        return self._constraint(LLMatcher.grammar_from_lark(text), "tools", thinking, "content or end" if choice == "auto" else "content")

    def _constraint(self, grammar: str, where: str, thinking: bool, *content: Prose) -> Constraint:
        self._check(grammar, where)
        return Constraint(grammar, where, ("reasoning", *content) if thinking else content)


def _schema_grammar(schema: dict, where: str) -> str:
    if not isinstance(schema, dict):
        raise InputError(f"{where}: expected an object, got {type(schema).__name__}")
    _check_depth(schema, DEEPEST_SCHEMA, where)
    try:
        text = json.dumps({key: value for key, value in schema.items() if key != "x-guidance"}, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise InputError(f"{where}: {error}") from error
    if len(text) > LONGEST_SCHEMA:
        raise InputError(f"{where}: {len(text)} characters of JSON; allowed: up to {LONGEST_SCHEMA}")
    try:
        return LLMatcher.grammar_from_json_schema(text, overrides=JSON_OPTIONS)
    except ValueError as error:
        raise InputError(f"{where}: {one_line(str(error))}") from error


def _check_depth(value: object, left: int, where: str) -> None:
    if left < 0:
        raise InputError(f"{where}: nested more than {DEEPEST_SCHEMA} deep")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, left - 1, where)
