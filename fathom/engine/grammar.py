"""Grammars that bound what an answer may be: JSON, JSON schemas, regexes and tool calls, as masks over the vocabulary.

An answer is free prose, where one special token ends each stretch (reasoning, content before tool calls), and then the grammar, run by
llguidance (Earley parser, regexes by derivatives: no backtracking). Prose costs nothing: its masks are made once. llguidance is an
optional package; without it everything here can be imported and nothing compiled.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from re import sub

import numpy as np
import torch
from torch import Tensor

from fathom.engine.tool_grammar import BEFORE_CALLS, JSON_OPTIONS, Tool, calls_grammar
from fathom.errors import InputError
from fathom.text.tokenizer import DSML, THINK_END, Tokenizer

try:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
except ImportError:
    LLMatcher = None

__all__ = ["Constraint", "Grammars", "Matcher", "Tool"]

LONGEST_SCHEMA, LONGEST_REGEX = 1 << 16, 1 << 12  # characters; the schema's as JSON
DEEPEST_SCHEMA = 64
MOST_TOOLS = 128
MOST_STATES = 50_000  # of an answer's lexer: about 30 MB at worst. The package's other limits stand: compiling takes a second at most


@dataclass(frozen=True)
class _Prose:
    """Free text up to the token `closer`, which may only stand right after the bytes `before`.

    Masks [V] of where the closer may not and may stand.
    """

    closer: int
    before: bytes
    open_V: Tensor
    closable_V: Tensor


@dataclass(frozen=True)
class Constraint:
    """What an answer may look like, compiled: immutable, for any number of answers."""

    _vocabulary: "_Vocabulary"
    _prose: tuple[_Prose, ...]
    _grammar: LLMatcher

    def start(self) -> "Matcher":
        """A matcher at the beginning of an answer, independent of all others."""
        return Matcher(self._vocabulary, self._prose, self._grammar.deep_copy())


class Matcher:
    """Where one answer stands in its grammar. `ended`: it is complete, and only the end token may follow."""

    def __init__(self, vocabulary: "_Vocabulary", prose: tuple[_Prose, ...], grammar: LLMatcher):
        self._vocabulary, self._prose, self._grammar = vocabulary, prose, grammar
        self._tail = b""  # of the current prose
        self.ended = False

    def allowed(self) -> Tensor:
        """Which tokens may come next, bool [V], not to be changed: the end token only where the answer may end.

        InputError where the grammar cannot go on: it needs more states than it may have, or no text satisfies it.
        """
        if self.ended:
            return self._vocabulary.end_V
        if self._prose:
            prose = self._prose[0]
            return prose.closable_V if self._tail.endswith(prose.before) else prose.open_V
        return self._vocabulary.mask(self._grammar)

    def accept(self, token: int) -> None:
        """Move on by a token of the answer; InputError for one that is not allowed, after which the matcher is of no more use."""
        if self.ended or self._prose:
            allowed_V = self.allowed()
            refused = not 0 <= token < len(allowed_V) or not allowed_V[token]
        else:
            refused = not self._grammar.consume_token(token)
        if refused:
            raise InputError(f"token {token} is not allowed here by the grammar; choose one of `allowed()`")
        if self._prose and token == self._prose[0].closer:
            self._prose, self._tail = self._prose[1:], b""
        elif self._prose:
            self.ended = token == self._vocabulary.eos_id
            self._tail = (self._tail + self._vocabulary.tokens[token])[-len(BEFORE_CALLS):]
        elif not self.ended:
            self.ended = self._grammar.is_stopped()


class Grammars:
    """Compiles constraints over `vocab_size` token ids for answers that `eos_id` ends; the last `kept` are kept in memory.

    With `thinking` an answer begins inside its reasoning: free text up to </think>, then the grammar. No special token is allowed
    but those of the format. All methods raise InputError for what is too large, broken or not supported.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_id: int, kept: int = 64):
        if LLMatcher is None:
            raise InputError("grammars need the llguidance package: pip install 'fathom[serve]'")
        self._vocabulary = _Vocabulary(tokenizer, vocab_size, eos_id)
        self._think_end, self._dsml = tokenizer.special_ids[THINK_END], tokenizer.special_ids[DSML]
        self._reasoning = self._vocabulary.prose(self._think_end, b"")
        self._content = {may_end: self._vocabulary.prose(self._dsml, BEFORE_CALLS.encode(), may_end) for may_end in (False, True)}
        self._compile = lru_cache(kept)(self._vocabulary.compile)

    def json_schema(self, schema: dict, thinking: bool) -> Constraint:
        """JSON that satisfies a schema; properties in the schema's order."""
        return self._constraint(self._schema_grammar(schema, "json schema"), "json schema", thinking)

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
                self._compile(self._schema_grammar(tool.parameters, where), where)
        text = calls_grammar(named, self._dsml, several=choice in ("auto", "required"))
        return self._constraint(LLMatcher.grammar_from_lark(text), "tools", thinking, (self._content[choice == "auto"],))

    def _constraint(self, grammar: str, where: str, thinking: bool, content: tuple[_Prose, ...] = ()) -> Constraint:
        prose = (self._reasoning, *content) if thinking else content
        return Constraint(self._vocabulary, prose, self._compile(grammar, where))

    def _schema_grammar(self, schema: dict, where: str) -> str:
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
            raise InputError(f"{where}: {_one_line(str(error))}") from error


class _Vocabulary:
    """The tokens' bytes, llguidance's own form of them, and masks [V] over them."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_id: int):
        self.size, self.eos_id = vocab_size, eos_id
        # What llguidance asks of a tokenizer.
        self.tokens = [tokenizer.token_bytes(id) for id in range(min(vocab_size, tokenizer.vocab_size))]
        self.special_token_ids = sorted(tokenizer.special_ids.values())
        self.eos_token_id, self.bos_token_id = eos_id, tokenizer.bos_id
        self._tokenizer = tokenizer
        self._llguidance = LLTokenizer(TokenizerWrapper(self), n_vocab=vocab_size)
        self._limits = LLParserLimits(max_lexer_states=MOST_STATES, verbose_errors=False)
        self.end_V = torch.zeros(vocab_size, dtype=torch.bool)
        self.end_V[eos_id] = True

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)

    def prose(self, closer: int, before: bytes, may_end: bool = False) -> _Prose:
        """Ordinary tokens up to `closer`; with `may_end` also the end token."""
        open_V = torch.zeros(self.size, dtype=torch.bool)
        open_V[:len(self.tokens)] = True
        open_V[self.special_token_ids] = False
        open_V[self.eos_id] = may_end
        closable_V = open_V.clone()
        closable_V[closer] = True
        return _Prose(closer, before, open_V, closable_V)

    def compile(self, grammar: str, where: str) -> LLMatcher:
        """A matcher to copy from, its first mask computed; InputError for a grammar that is broken, too large or empty."""
        matcher = LLMatcher(self._llguidance, grammar, log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        if matcher.is_error():
            raise InputError(f"{where}: {_one_line(matcher.get_error())}")
        return matcher

    def mask(self, matcher: LLMatcher) -> Tensor:
        """The tokens that may come next, bool [V]."""
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise InputError(f"the grammar cannot go on: {_one_line(matcher.get_error())}")
        return torch.from_numpy(np.unpackbits(bits, count=self.size, bitorder="little").view(np.bool_))


def _check_depth(value: object, left: int, where: str) -> None:
    if left < 0:
        raise InputError(f"{where}: nested more than {DEEPEST_SCHEMA} deep")
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_depth(inner, left - 1, where)


def _one_line(message: str) -> str:
    """What llguidance says, without its pointers into the grammar."""
    if "NoExtension" in message:
        return "no text satisfies it"
    lines = [sub(r"^at \d+\(\d+\): ", "", line) for line in message.splitlines()] or [""]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])[:200]
