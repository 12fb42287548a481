"""Rollouts: turns, tools, budgets and limits, groups, and a log from which they go on as if nothing had happened."""

import random
from collections import deque
from types import SimpleNamespace

import pytest

from fathom.align.rollout import Draw, Player, new_engine, new_rollouts, play
from fathom.align.rollout_log import RolloutLog
from fathom.align.sample import Mode, prompt_ids
from fathom.engine.request import Output, Written
from fathom.text import chat
from fathom.text.tokenizer import THINK_END
from tests.align.toy import TOYS, micro_tokenizer
from tests.models import random_model, small_config


@pytest.fixture(scope="module")
def tokenizer():
    return micro_tokenizer()


@pytest.fixture(scope="module")
def model():
    return random_model(small_config([4, 0], vocab_size=320, hidden_size=32, index_n_heads=2, hc_mult=2, hc_sinkhorn_iters=5))


class Scripted:
    """An engine whose answers are written beforehand: for each request, a list of tokens for each choice."""

    def __init__(self, tokenizer, script, max_tokens=10_000):
        self.tokenizer, self.script, self.max_tokens = tokenizer, script, max_tokens
        self.config = SimpleNamespace(eos_token_id=tokenizer.eos_id)
        self.requests, self._outputs = [], deque()

    @property
    def has_work(self):
        return bool(self._outputs)

    def add(self, request):
        self.requests.append(request)
        number = len(self.requests)
        for choice in range(request.first_choice, request.first_choice + request.choices):
            for count, token in enumerate(self.script(request, choice), 1):
                ends = token in (self.tokenizer.eos_id, *request.sampling.stop_ids)
                finish = "stop" if ends else "length" if count == request.sampling.max_tokens else None
                self._outputs.append(Output(number, choice, "", (Written(token, -1.0),), finish, 0))
                if finish:
                    break
        return number

    def step(self):
        return [self._outputs.popleft()]


def written_text(tokenizer, rollout):
    return tokenizer.decode([token for token, own in zip(rollout.tokens, rollout.written, strict=True) if own])


@pytest.mark.parametrize("effort", ["chat", "high", "max"])
def test_an_episode_with_tools_is_the_text_that_the_chat_format_writes(tokenizer, effort):
    environment, mode = TOYS["looking"], Mode(effort, tokens=2000)
    task = environment.task(3)
    turns = environment.demonstration(task, effort)
    answers = [turn for turn in turns if turn["role"] == "assistant"]

    def script(request, choice):
        done = sum(1 for number in range(len(request.prompt)) if request.prompt[number] == tokenizer.eos_id)
        before = turns[:2 * done]
        whole = prompt_ids(task, effort, [*before, answers[done]], tokenizer)
        return whole[len(prompt_ids(task, effort, before, tokenizer)):]

    engine = Scripted(tokenizer, script)
    (rollout,) = new_rollouts([(task, mode)], 1, tokenizer)
    play(engine, [rollout], TOYS, Draw(), 0)
    assert rollout.tokens == prompt_ids(task, effort, turns, tokenizer) and rollout.finish == "stop"
    assert rollout.score.reward == 1 and rollout.score.calls == rollout.score.valid_calls == 2
    segments = chat.segments(task.messages + turns, "chat" if effort == "chat" else "thinking", drop_thinking=False)
    assert written_text(tokenizer, rollout).count("<｜end▁of▁sentence｜>") == 3 and "tool_result" not in written_text(tokenizer, rollout)
    assert "".join(segment.text for segment in segments).endswith(written_text(tokenizer, rollout)[-20:])


def test_a_budget_closes_the_reasoning_and_what_is_forced_is_not_the_models(tokenizer):
    environment = TOYS["letters"]
    task, think_end, words = environment.task(1), tokenizer.special_ids[THINK_END], tokenizer.encode("the sea was calm and the captain")
    answer = [*tokenizer.encode("eeee"), tokenizer.eos_id]

    def script(request, choice):
        return answer if think_end in request.prompt else (words * 9 if choice == 0 else [words[0], think_end])

    engine = Scripted(tokenizer, script)
    rollouts = new_rollouts([(task, Mode("high", tokens=100, thinking_budget=5))], 2, tokenizer)
    play(engine, rollouts, TOYS, Draw(), 0)
    prompt = prompt_ids(task, "high", [], tokenizer)
    assert rollouts[0].tokens == [*prompt, *words[:5], think_end, *answer]
    assert rollouts[0].written == [False] * len(prompt) + [True] * 5 + [False] + [True] * len(answer)
    assert rollouts[1].tokens == [*prompt, words[0], think_end, *answer] and all(rollouts[1].written[len(prompt):])
    assert [rollout.score.reward for rollout in rollouts] == [1, 1] and rollouts[0].turns[0]["content"] == "eeee"
    (none,) = new_rollouts([(task, Mode("high", thinking_budget=0))], 1, tokenizer)
    play(engine, [none], TOYS, Draw(), 0)
    assert none.tokens == [*prompt, think_end, *answer]


def test_an_answer_that_is_cut_off_is_marked_and_invalid(tokenizer):
    task = TOYS["letters"].task(1)
    (rollout,) = new_rollouts([(task, Mode("chat", tokens=3, length_penalty=0.5))], 1, tokenizer)
    play(Scripted(tokenizer, lambda request, choice: tokenizer.encode("e") * 9), [rollout], TOYS, Draw(), 0)
    assert rollout.finish == "length" and rollout.count == 3 and rollout.turns[-1]["wo_eos"] and rollout.is_invalid
    assert rollout.reward(invalid=0.2) == pytest.approx(0.75 * (1 - 0.5) - 0.2)
    (short,) = new_rollouts([(task, Mode("chat", tokens=30))], 1, tokenizer)
    play(Scripted(tokenizer, lambda request, choice: tokenizer.encode("e") * 9, max_tokens=len(short.tokens) + 5), [short], TOYS, Draw(), 0)
    assert short.finish == "length" and short.count == 4


def rollouts_of(tokenizer, tokens=24, members=5):
    modes = [Mode("chat", tokens), Mode("high", tokens, thinking_budget=6)]
    return new_rollouts([(TOYS["letters"].task(seed), mode) for seed in range(2) for mode in modes], members, tokenizer)


def state(rollout):
    return rollout.tokens, rollout.written, rollout.finish, rollout.score, rollout.turns, rollout.count


class Killed(Exception):
    pass


class Dying(RolloutLog):
    """A log that fails after so many lines, the last of them cut off."""

    def __init__(self, path, head, lines):
        self.left = lines
        super().__init__(path, head)

    def append(self, kind, *values):
        if self.left == 0:
            with open(self.path, "ab") as file:
                file.write(b'12345678 ["written",[[0,')
            raise Killed
        self.left -= 1
        super().append(kind, *values)


def test_rollouts_that_are_killed_again_and_again_are_the_same_as_unbroken_ones(tmp_path, model, tokenizer):
    def engine():
        return new_engine(model, tokenizer, Draw(running=16, cache_mib=32), 64)

    unbroken = rollouts_of(tokenizer)
    play(engine(), unbroken, TOYS, Draw(), 5)
    assert len({tuple(rollout.tokens) for rollout in unbroken}) == len(unbroken)  # every member draws for itself
    rng, path, lives = random.Random(0), tmp_path / "round.log", 0
    while True:
        again = rollouts_of(tokenizer)
        lives += 1
        try:
            play(engine(), again, TOYS, Draw(), 5, Dying(path, {"round": 1}, rng.randrange(2, 16)))
            break
        except Killed:
            pass
    assert lives > 3 and [state(rollout) for rollout in again] == [state(rollout) for rollout in unbroken]
    sampled = sum(len(values[0]) for kind, *values in RolloutLog(path, {"round": 1}).found if kind == "written")
    assert sampled == sum(rollout.count for rollout in unbroken)  # no token lost, none sampled twice


def test_a_finished_log_is_replayed_without_an_engine(tmp_path, model, tokenizer):
    log = RolloutLog(tmp_path / "log", {"round": 1})
    first, again = rollouts_of(tokenizer), rollouts_of(tokenizer)
    play(new_engine(model, tokenizer, Draw(), 64), first, TOYS, Draw(), 5, log)
    log.seal()

    def refuse(request, choice):
        raise AssertionError("nothing is left to sample")

    player = Player(Scripted(tokenizer, refuse), again, TOYS, Draw(), 5, RolloutLog(tmp_path / "log", {"round": 1}))
    player.replay()
    player.run()
    assert [state(rollout) for rollout in again] == [state(rollout) for rollout in first]


def test_a_log_of_other_work_is_dropped_and_a_damaged_line_ends_it(tmp_path):
    log = RolloutLog(tmp_path / "log", {"weights": "a"})
    for number in range(3):
        log.append("written", [[number, 1, -0.5]])
    log.seal()
    assert len(RolloutLog(tmp_path / "log", {"weights": "a"}).found) == 3
    lines = (tmp_path / "log").read_bytes().splitlines(keepends=True)
    (tmp_path / "log").write_bytes(b"".join([*lines[:2], lines[2].replace(b"1,1", b"1,2"), lines[3]]))
    assert RolloutLog(tmp_path / "log", {"weights": "a"}).found == [["written", [[0, 1, -0.5]]]]
    assert RolloutLog(tmp_path / "log", {"weights": "b"}).found == []
    assert RolloutLog(tmp_path / "log", {"weights": "a"}).found == []
