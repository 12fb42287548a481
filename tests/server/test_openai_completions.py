"""The official openai client against a server: completions."""

import openai
import pytest

from tests.server.openai_kit import client, prompt_of


@pytest.fixture
def complete(server):
    def ask(prompt="hello", **wishes):
        return client(server).completions.create(model="fathom", prompt=prompt, **wishes)
    return ask


def test_a_text_is_continued(complete, server):
    answer = complete()
    assert (answer.object, answer.choices[0].text, answer.choices[0].finish_reason) == ("text_completion", "hello world", "stop")
    assert prompt_of(server) == "<｜begin▁of▁sentence｜>hello" and server.engine.requests[-1].sampling.max_tokens == 16
    assert answer.usage.prompt_tokens == len(server.engine.requests[-1].prompt)


def test_what_belongs_between_prefix_and_suffix_is_asked_for(complete, server):
    complete("def f(x):\n", suffix="\n    return y")
    assert prompt_of(server) == "<｜begin▁of▁sentence｜><｜fim▁begin｜>def f(x):\n<｜fim▁hole｜>\n    return y<｜fim▁end｜>"
    beta = client(server, "/beta").completions.create(model="fathom", prompt="a", suffix="b", max_tokens=4000)
    assert beta.choices[0].text == "hello world" and server.engine.requests[-1].sampling.max_tokens == 4000


def test_many_prompts_have_their_choices_in_order(complete, server):
    answer = complete(["one", "two", "three"], n=2, echo=True)
    assert [choice.index for choice in answer.choices] == [*range(6)]
    assert [choice.text for choice in answer.choices] == [word + "hello world" for word in ("one", "one", "two", "two", "three", "three")]
    assert answer.usage.prompt_tokens == sum(len(request.prompt) for request in server.engine.requests[-3:])


def test_token_ids_are_continued_as_they_are(complete, server):
    ids = server.engine.tokenizer.encode("the quick fox")
    assert complete(ids, echo=True).choices[0].text == "the quick foxhello world"
    assert server.engine.requests[-1].prompt == tuple(ids)
    complete([ids, ids[:2]])
    assert [request.prompt for request in server.engine.requests[-2:]] == [tuple(ids), tuple(ids[:2])]


def test_streamed_completions_add_up_and_end_with_usage(complete):
    chunks = [*complete(["one", "two"], stream=True, echo=True, stream_options={"include_usage": True})]
    *pieces, last = chunks
    assert last.choices == [] and last.usage.completion_tokens > 0 and all(chunk.usage is None for chunk in pieces)
    for index, word in enumerate(("one", "two")):
        own = [chunk.choices[0] for chunk in pieces if chunk.choices[0].index == index]
        assert "".join(choice.text for choice in own) == word + "hello world"
        assert [choice.finish_reason for choice in own] == [None] * (len(own) - 1) + ["stop"]
    assert all(chunk.choices for chunk in complete(stream=True))


def test_log_probabilities_stand_in_lists_of_one_length(complete):
    for stream in (False, True):
        answer = complete("x", logprobs=2, stream=stream)
        parts = [chunk.choices[0].logprobs for chunk in answer] if stream else [answer.choices[0].logprobs]
        tokens, offsets = ([value for part in parts for value in getattr(part, name)] for name in ("tokens", "text_offset"))
        assert "".join(tokens) == "hello world" and offsets == [sum(map(len, tokens[:index])) for index in range(len(tokens))]
        assert [value for part in parts for value in part.token_logprobs] == [-0.5] * len(tokens)
        assert all(len(top) == 2 for part in parts for top in part.top_logprobs)


@pytest.mark.parametrize(("wishes", "param", "words"), [
    (dict(prompt=[1, 2], suffix="x"), "suffix", "text"), (dict(prompt=["a"] * 65), "prompt", "allowed: up to 64"),
    (dict(echo=True, logprobs=1), "logprobs", "not computed"), (dict(best_of=3), "best_of", "use n"), (dict(prompt=[]), "prompt", "at least 1"),
    (dict(prompt=[[1], []]), "prompt[1]", "at least 1"), (dict(logprobs=21), "logprobs", "20"), (dict(prompt=[1, "x"]), "prompt[1]", "integer"),
    (dict(n=9), "n", "allowed: 1 to 8"), (dict(prompt="a" * 200_000), None, "maximum context length"), (dict(prompt=[-1]), "prompt[0]", "0")])
def test_completions_that_cannot_be_made_are_refused(complete, server, wishes, param, words):
    with pytest.raises(openai.BadRequestError, match=words) as refusal:
        complete(**wishes)
    assert refusal.value.param == param
    assert not server.engine.has_work
