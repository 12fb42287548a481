"""Grammars as masks over the vocabulary: compiled, and followed token by token.

An answer is free prose, where one special token ends each stretch (reasoning, content before tool calls), and then the grammar, run by
llguidance (Earley parser, regexes by derivatives: no backtracking). Prose costs nothing: its masks are made once. llguidance is an
optional package; without it everything here can be imported and nothing compiled.
"""

from dataclasses import dataclass
from functools import lru_cache
from re import sub
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from fathom.engine.tool_grammar import BEFORE_CALLS
from fathom.errors import InputError
from fathom.text.tokenizer import DSML, THINK_END, Tokenizer

try:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
except ImportError:
    LLMatcher = None

MOST_STATES = 50_000  # of an answer's lexer: about 30 MB at worst. The package's other limits stand: compiling takes a second at most
Prose = Literal["reasoning", "content", "content or end"]


def require_package() -> None:
    """InputError where llguidance is missing."""
    if LLMatcher is None:
        raise InputError("grammars need the llguidance package: pip install 'fathom[serve]'")


@dataclass(frozen=True)
class Constraint:
    """What an answer may look like, as text: stretches of free text, each up to its special token (</think>; the marker of tool calls), then what `grammar` accepts, to the end.

    "content or end": the answer may end before any call. `where` names the part of a request that asked for it, for error messages.
    """

    grammar: str
    where: str
    prose: tuple[Prose, ...] = ()


@dataclass(frozen=True)
class _Prose:
    """Free text up to the token `closer`, which may only stand right after the bytes `before`.

    Masks [V] of where the closer may not and may stand.
    """

    closer: int
    before: bytes
    open_V: Tensor
    closable_V: Tensor


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


class Compiler:
    """Grammars -> matchers over `vocab_size` token ids, for answers that `eos_id` ends; the last `kept` grammars stay compiled.

    Any number of threads may use it. InputError without llguidance.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_id: int, kept: int = 64):
        require_package()
        self._vocabulary = vocabulary = _Vocabulary(tokenizer, vocab_size, eos_id)
        think_end, dsml = tokenizer.special_ids[THINK_END], tokenizer.special_ids[DSML]
        self._prose = {"reasoning": vocabulary.prose(think_end, b""), "content": vocabulary.prose(dsml, BEFORE_CALLS.encode()),
                       "content or end": vocabulary.prose(dsml, BEFORE_CALLS.encode(), may_end=True)}
        self._compile = lru_cache(kept)(vocabulary.compile)

    def check(self, grammar: str, where: str) -> None:
        """Compile it; InputError, one line that begins with `where`, for a grammar that is broken, too large or empty."""
        self._compile(grammar, where)

    def start(self, constraint: Constraint) -> Matcher:
        """A matcher at the beginning of an answer, independent of all others."""
        grammar = self._compile(constraint.grammar, constraint.where).deep_copy()
        return Matcher(self._vocabulary, tuple(self._prose[kind] for kind in constraint.prose), grammar)


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
            raise InputError(f"{where}: {one_line(matcher.get_error())}")
        return matcher

    def mask(self, matcher: LLMatcher) -> Tensor:
        """The tokens that may come next, bool [V]."""
        bits = np.frombuffer(matcher.compute_bitmask(), np.uint8)
        if matcher.is_error():
            raise InputError(f"the grammar cannot go on: {one_line(matcher.get_error())}")
        return torch.from_numpy(np.unpackbits(bits, count=self.size, bitorder="little").view(np.bool_))


def one_line(message: str) -> str:
    """What llguidance says, without its pointers into the grammar."""
    if "NoExtension" in message:
        return "no text satisfies it"
    lines = [sub(r"^at \d+\(\d+\): ", "", line) for line in message.splitlines()] or [""]
    return next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), lines[0])[:200]
