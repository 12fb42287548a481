"""Environments: the same task for the same seed, disjoint splits, demonstrations that are right, and as a file for fine-tuning."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.align.environments import ENVIRONMENTS, environment
from fathom.align.environments.agent import arguments_of, calls_of
from fathom.align.environments.base import EFFORTS, SEEDS, Task, tool_call
from fathom.align.sft import Sft, conversations, examples
from fathom.align.solved import solved, write_solved
from fathom.errors import InputError
from fathom.optim.schedules import Schedule
from fathom.text import chat
from fathom.text.chat_stream import read_answer
from fathom.text.tokenizer import EOS, SPECIAL_TOKENS, Tokenizer
from tests.align.conftest import BOTH, tasks


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_same_seed_gives_the_same_task_and_json_keeps_it(domains, name):
    first, second = tasks(domains[name], 20), tasks(environment(name), 20)
    assert first == second
    assert [Task(**json.loads(json.dumps(vars(task)))) for task in first] == first
    assert len({task.key for task in first}) == len(first)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_no_question_of_one_split_is_asked_in_the_other(domains, name):
    for level in domains[name].levels:
        train, held_out = ({domains[name].task(seed, split, level).question for seed in range(150)} for split in BOTH)
        assert train and held_out and not train & held_out
        assert len(train) > 50 and len(held_out) >= 5


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_demonstrations_of_every_level_and_effort_are_right(domains, name):
    domain = domains[name]
    episodes = [(task, domain.demonstration(task, effort)) for task in tasks(domain, 12) for effort in EFFORTS]
    scores = domain.scores(episodes)
    assert all(score.reward == 1 and score.valid and score.calls == score.valid_calls for score in scores), \
        [(task, score) for (task, _), score in zip(episodes, scores, strict=True) if score.reward < 1][:1]
    assert domain.score(*episodes[0]) == scores[0]
    for task, turns in episodes:
        assert domain.demonstration(task, "chat") == domain.demonstration(task, "chat")
        assert domain.step(task, turns) is None


@pytest.mark.parametrize("name", ["math", "code", "agent", "instructions"])
def test_careless_demonstrations_are_finished_and_leave_something_out(domains, name):
    domain = domains[name]
    pairs = [(task, effort) for task in tasks(domain, 12) for effort in EFFORTS]
    scores = domain.scores([(task, domain.careless(task, effort)) for task, effort in pairs])
    assert all(score.valid and score.calls == score.valid_calls for score in scores)
    assert sum(score.reward for score in scores) <= 0.15 * len(scores)  # a last step of a program may change nothing

    def length(turns):
        return sum(len(str(turn.get(part) or "")) for turn in turns for part in ("content", "reasoning_content", "tool_calls"))

    shorter = [length(domain.careless(*pair)) < length(domain.demonstration(*pair)) for pair in pairs]
    assert sum(shorter) > 0.7 * len(pairs)  # as a rule; words that come of a constraint less may be longer


def test_the_careless_make_the_only_call_of_a_request_to_the_shop(domains):
    shop = domains["agent"]
    for task in [shop.task(seed, "train", level=1) for seed in range(40)]:
        done, careless = shop.demonstration(task, "high"), shop.careless(task, "high")
        called, made = (calls_of([turn for turn in turns if turn["role"] == "assistant"]) for turns in (done, careless))
        wanted, given = arguments_of(called[0]), [arguments_of(call) for call in made]
        if "text" not in wanted:
            assert given == [wanted] and (careless[-1]["content"], done[-1]["content"]) == ("Done.", str(task.facts["goal"]["answer"]))
        elif " " in wanted["text"]:
            assert given == [wanted | {"text": wanted["text"].rpartition(" ")[0]}]
        else:
            assert given == []
        assert shop.score(task, careless).reward == 0


def test_a_domain_without_careless_demonstrations_says_so(domains):
    with pytest.raises(InputError, match="judging has no careless demonstrations"):
        domains["judging"].careless(domains["judging"].task(0), "chat")


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_reasoning_grows_with_effort_and_level(domains, name):
    def length(level, effort):
        turns = (turn for seed in range(40) for turn in domains[name].demonstration(domains[name].task(seed, "train", level), effort))
        return sum(len(turn.get("reasoning_content", "")) for turn in turns if turn["role"] == "assistant")

    for level in domains[name].levels:
        assert length(level, "chat") == 0 < length(level, "high") <= length(level, "max")
    low, high = domains[name].levels[0], domains[name].levels[-1]
    assert length(low, "high") < length(high, "high") < length(high, "max")


@pytest.mark.parametrize("name", ENVIRONMENTS)
@pytest.mark.parametrize("effort", EFFORTS)
def test_demonstrations_survive_the_chat_format(domains, name, effort):
    mode, reasoning_effort = EFFORTS[effort]
    for task in tasks(domains[name], 3):
        turns = domains[name].demonstration(task, effort)
        for at, turn in enumerate(turns):
            if turn["role"] == "assistant":
                prompt, whole = (chat.encode(task.messages + turns[:end], mode, reasoning_effort) for end in (at, at + 1))
                assert whole.startswith(prompt)
                written = whole[len(prompt):]
                assert chat.parse(written, mode) == turn == read_answer(written, mode == "thinking", bool(task.tools))
                assert not any(token in text for token in SPECIAL_TOKENS for text in (turn["content"], turn["reasoning_content"]))


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_an_answer_that_is_missing_cut_off_or_only_thought_scores_nothing(domains, name):
    domain = domains[name]
    for task in tasks(domain, 2):
        *before, last = domain.demonstration(task, "high")
        for broken in ({**last, "wo_eos": True}, {**last, "content": "", "reasoning_content": last["content"]},
                       {**last, "content": last["content"] + EOS}, {**last, "content": f"<think>{last['content']}"},
                       {**last, "tool_calls": [tool_call("answer", {})]}, {"role": "user", "content": last["content"]}):
            score = domain.score(task, [*before, broken])
            assert score.reward == 0 and not score.valid, broken
        assert domain.score(task, []).reward == domain.score(task, [last, {"role": "user", "content": "well?"}]).reward == 0


@settings(deadline=None, max_examples=60)
@given(text=st.text(max_size=60), name=st.sampled_from(["math", "agent", "instructions"]))
def test_no_text_whatever_breaks_the_scoring(text, name):
    domain = environment(name)
    task = domain.task(1, "train", 2)
    for thinking in (True, False):
        score = domain.score(task, [read_answer(text, thinking)])
        assert 0 <= score.reward <= 1 and "\n" not in score.reason


def test_arguments_out_of_range_are_named():
    domain = environment("math")
    for arguments, complaint in (((-1,), "seed is -1"), ((SEEDS,), "seed is"), ((0, "test"), "split is 'test'"),
                                 ((0, "train", 99), "math has levels 1 to 6")):
        with pytest.raises(InputError, match=complaint):
            domain.task(*arguments)
    with pytest.raises(InputError, match="effort is 'low'"):
        domain.demonstration(domain.task(0), "low")
    with pytest.raises(InputError, match="'chess' is unknown; there are math"):
        environment("chess")


# Demonstrations as a file


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["Start with 17. Add 4. What is the result? Choose these words. find_person send order"] * 4, 420)


def test_demonstrations_are_written_as_fine_tuning_reads_them(domains, tmp_path, tokenizer):
    path = tmp_path / "solved.jsonl"
    efforts = {"chat": 1, "high": 2, "max": 1}
    write_solved(path, [domains["math"], domains["agent"]], 40, [1, 2, 6], efforts, seed=3)
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 80 and len({row["task"] for row in rows}) == 80
    assert {row["task"].split("/")[1] for row in rows} == {"train"} and {row["task"][-1] for row in rows} == {"1", "2", "6"}
    modes = [(row["thinking_mode"], row.get("reasoning_effort")) for row in rows]
    assert {mode: modes.count(mode) > 5 for mode in modes} == {("chat", None): True, ("thinking", "high"): True, ("thinking", "max"): True}
    recipe = Sft(run="r", base="b", schedule=Schedule(steps=1, batch_tokens=4096, warmup_steps=0), messages=path.name)
    read = conversations(recipe, tmp_path, False, {})
    assert [messages for messages, _, _ in read] == [row["messages"] for row in rows]
    assert [(mode, effort) for _, mode, effort in read] == modes
    for messages, mode, effort in read[:10]:
        learned = examples(messages, mode, tokenizer, effort)
        targets = [tokenizer.decode([id for id, target in zip(*example, strict=True) if target]) for example in learned]
        assert "".join(targets).count(EOS) == sum(message["role"] == "assistant" for message in messages)
        ids, last = learned[-1][0], messages[-1]
        assert targets[-1].endswith((f"{last['reasoning_content']}</think>" if mode == "thinking" else "") + last["content"] + EOS)
        assert ("Absolute maximum" in tokenizer.decode(ids)) == (effort == "max")


def test_bad_mixtures_are_named(domains):
    for levels, efforts in (([], {"chat": 1}), ([1], {"chat": 0}), ([1], {"chat": -1}), ([1], {}), ([1], {"low": 1})):
        with pytest.raises(InputError):
            list(solved(domains["math"], 1, levels, efforts))
