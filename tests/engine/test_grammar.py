"""Constrained answers: whatever a model likes to write, the result satisfies the schema, the regex or the tools' format."""

import json
import random
import re

import pytest
import torch

from fathom.engine.constraint import Grammars, Tool
from fathom.engine.engine import Engine
from fathom.engine.grammar import Compiler
from fathom.engine.request import Request
from fathom.engine.sampler import Sampling
from fathom.errors import InputError
from fathom.text import chat
from fathom.text.tokenizer import DSML, THINK_END, Tokenizer
from tests.models import random_model, small_config

SCHEMA = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 0},
                                           "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 3}},
          "required": ["name", "age", "tags"], "additionalProperties": False}
WEATHER = Tool("get_weather", {"type": "object", "properties": {"city": {"type": "string", "maxLength": 9}, "days": {"type": "integer"}},
                               "required": ["city", "days"], "additionalProperties": False}, strict=True)
SEARCH = Tool("search", {"type": "object", "properties": {"query": {"type": "string"}}})


@pytest.fixture(scope="module")
def tokenizer():
    texts = ['{"name": "Ann", "age": 31, "tags": ["a"]}', "<tool_calls> invoke name= parameter string=true false </", "a page of text"]
    return Tokenizer.train(texts * 3, 340)


@pytest.fixture(scope="module")
def compiler(tokenizer):
    return Compiler(tokenizer, tokenizer.vocab_size, tokenizer.eos_id)


@pytest.fixture(scope="module")
def grammars(tokenizer, compiler):
    return Grammars(tokenizer, compiler.check)


def walk(matcher, tokenizer, seed, most=500, phrases=()):
    """A random answer: tokens drawn from what is allowed, now and then one of the phrases, the end soon after it may come."""
    generator, tokens, phrase = random.Random(seed), [], []
    for _ in range(most):
        allowed_V = matcher.allowed()
        if not phrase and phrases and generator.random() < 0.4:
            phrase = [*generator.choice(phrases)]
        if phrase and not allowed_V[phrase[0]]:
            phrase = []
        choices = allowed_V.nonzero().flatten().tolist()
        assert choices, tokenizer.decode(tokens)
        ends = allowed_V[tokenizer.eos_id] and generator.random() < 0.3
        token = tokenizer.eos_id if ends else phrase.pop(0) if phrase else generator.choice(choices)
        matcher.accept(token)
        if token == tokenizer.eos_id:
            return tokenizer.decode(tokens)
        tokens.append(token)
    return None


def spelled(tokenizer, *texts):
    return [tokenizer.encode(text, special=True) for text in texts]


def fits(value):
    return (set(value) == {"name", "age", "tags"} and isinstance(value["name"], str) and len(value["name"]) <= 8
            and isinstance(value["age"], int) and value["age"] >= 0 and set(value["tags"]) <= {"a", "b"} and len(value["tags"]) <= 3)


@pytest.mark.parametrize("thinking", [False, True])
def test_random_answers_satisfy_the_schema(grammars, compiler, tokenizer, thinking):
    constraint, done = grammars.json_schema(SCHEMA, thinking), 0
    for seed in range(120):
        text = walk(compiler.start(constraint), tokenizer, seed, phrases=spelled(tokenizer, '"', '}', ']', THINK_END))
        if text is not None:
            done += 1
            assert fits(json.loads(text.split(THINK_END, 1)[-1])), text
            assert (THINK_END in text) == thinking
    assert done > 60


def test_random_answers_are_json_objects_or_match_the_regex(grammars, compiler, tokenizer):
    for seed in range(60):
        text = walk(compiler.start(grammars.json_object(False)), tokenizer, seed, phrases=spelled(tokenizer, '"', '}', ']'))
        assert text is None or isinstance(json.loads(text), dict)
        text = walk(compiler.start(grammars.regex(r"[a-c]{2,5}-[0-9]+(x|yz)?", False)), tokenizer, seed)
        assert text is not None and re.fullmatch(r"[a-c]{2,5}-[0-9]+(x|yz)?", text)


@pytest.mark.parametrize("thinking", [False, True])
@pytest.mark.parametrize("choice", ["required", "get_weather", "auto"])
def test_random_tool_calls_are_read_back_and_satisfy_their_schemas(grammars, compiler, tokenizer, choice, thinking):
    constraint, calls, done = grammars.tools([WEATHER, SEARCH], choice, thinking), 0, 0
    phrases = spelled(tokenizer, THINK_END, f"\n\n<{DSML}", f"</{DSML}", '">')
    for seed in range(150):
        text = walk(compiler.start(constraint), tokenizer, seed, phrases=phrases)
        if text is None:
            continue
        done += 1
        message = chat.parse(text + "<｜end▁of▁sentence｜>", "thinking" if thinking else "chat")
        for call in message["tool_calls"]:
            calls += 1
            name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
            assert name in ({"get_weather"} if choice == "get_weather" else {"get_weather", "search"})
            assert name == "search" or set(arguments) == {"city", "days"} and isinstance(arguments["days"], int)
        assert choice == "auto" or message["tool_calls"]
    assert done > 20 and calls >= (10 if choice == "auto" else 20)


def test_special_tokens_are_never_part_of_a_value(grammars, compiler, tokenizer):
    matcher = compiler.start(grammars.json_schema(SCHEMA, False))
    for token in tokenizer.encode('{"name": "'):
        matcher.accept(token)
    allowed_V = matcher.allowed()
    assert allowed_V.sum() > 100 and not any(allowed_V[token] for token in tokenizer.special_ids.values())
    with pytest.raises(InputError, match="is not allowed here"):
        matcher.accept(tokenizer.special_ids[DSML])


def test_matchers_of_one_constraint_are_independent(grammars, compiler, tokenizer):
    constraint = grammars.regex("ab|cd", False)
    first, second = compiler.start(constraint), compiler.start(constraint)
    first.accept(*tokenizer.encode("a"))
    assert second.allowed()[tokenizer.encode("c")[0]] and not first.allowed()[tokenizer.encode("c")[0]]


@pytest.mark.parametrize("make", [
    lambda g: g.regex("(", False), lambda g: g.regex("a" * 5000, False),
    lambda g: g.regex("(?=a)b", False), lambda g: g.regex("\ud800", False), lambda g: g.json_schema({"type": "nonsense"}, False),
    lambda g: g.json_schema({"$ref": "http://elsewhere/schema"}, False), lambda g: g.json_schema({"enum": ["x" * 70000]}, False),
    lambda g: g.json_schema([], False), lambda g: g.tools([], "auto", False), lambda g: g.tools([SEARCH], "unknown", False),
    lambda g: g.tools([SEARCH, SEARCH], "auto", False), lambda g: g.tools([Tool("f", {"type": 7}, strict=True)], "auto", False)])
def test_what_cannot_be_compiled_is_one_line(grammars, make):
    with pytest.raises(InputError) as caught:
        make(grammars)
    assert "\n" not in str(caught.value)


def test_a_deep_schema_is_refused(grammars):
    schema = {"type": "object"}
    for _ in range(100):
        schema = {"type": "object", "properties": {"x": schema}}
    with pytest.raises(InputError, match="nested more than 64 deep"):
        grammars.json_schema(schema, False)


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|aa)+$", "(.*)*x", "[a-z]{1,200}([a-z]{1,200})?"])
def test_patterns_that_ruin_backtracking_matchers_are_harmless(grammars, compiler, tokenizer, pattern):
    matcher = compiler.start(grammars.regex(pattern, False))
    for token in tokenizer.encode("a" * 150):
        if not matcher.allowed()[token]:
            break
        matcher.accept(token)


@pytest.mark.parametrize("drafts", [0, 2])
def test_the_engine_writes_what_the_grammar_allows(tokenizer, drafts):
    model = random_model(small_config([4, 128], vocab_size=360, num_nextn_predict_layers=1))
    engine = Engine(model, tokenizer)
    plain = [engine.run(Request((30, 31), Sampling(seed=seed, max_tokens=60), constraint=engine.grammars.regex(r"[0-9]{3}(,[0-9]{3}){2}", False)))
             for seed in range(5)]
    texts = ["".join(output.text for output in outputs) for outputs in plain]
    assert all(re.fullmatch(r"[0-9]{3}(,[0-9]{3}){2}", text) for text in texts) and len(set(texts)) == 5
    assert torch.equal(engine.compiler.start(engine.grammars.regex("a", False)).allowed().nonzero().flatten(), torch.tensor(tokenizer.encode("a")))
