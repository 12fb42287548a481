"""Environments: the same task for the same seed, disjoint splits, right answers score 1, wrong ones and tricks score 0."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom.align.environments import ENVIRONMENTS, environment
from fathom.align.environments.agent import CALLS_A_TURN, SIGNATURES, TOOLS
from fathom.align.environments.base import EFFORTS, SEEDS, Task, assistant, tool_call
from fathom.align.environments.code import CodeEnvironment, code_of
from fathom.align.environments.instructions import broken_constraint
from fathom.align.environments.instructions import question as asked
from fathom.align.environments.judging import JudgingEnvironment
from fathom.align.environments.math import MathEnvironment, number, same_value
from fathom.align.sandbox import Program, Sandbox, SandboxError
from fathom.align.sft import Sft, conversations, examples
from fathom.align.solved import solved, write_solved
from fathom.data.questions import is_held_out
from fathom.errors import InputError
from fathom.optim.schedules import Schedule
from fathom.text import chat
from fathom.text.chat_stream import read_answer
from fathom.text.tokenizer import EOS, SPECIAL_TOKENS, Tokenizer

BOTH = ("train", "held_out")


def isolation():
    try:
        with Sandbox() as sandbox:
            sandbox.run([Program("")])
        return "namespaces"
    except SandboxError:
        return "limits"


@pytest.fixture(scope="module")
def domains():
    made = {name: make() for name, make in ENVIRONMENTS.items() if name != "code"}
    made["code"] = CodeEnvironment(isolation=isolation())
    yield made
    made["code"].close()


def tasks(domain, count, splits=BOTH):
    return [domain.task(seed, split, level) for level in domain.levels for split in splits for seed in range(count)]


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


# Mathematics


@pytest.mark.parametrize("text, expected", [
    ("12", "12"), (" 12. ", "12"), ("Answer: 12", "12"), ("The answer is 12.", "12"), ("\\boxed{12}", "12"), ("$12$", "12"),
    ("$\\boxed{1,234}$", "1234"), ("+12", "12"), ("-3", "-3"), ("1 2 3", "123"), ("12.0", "12"), ("24/2", "12"), ("2/4", "1/2"),
    ("0.5", "1/2"), ("\\frac{3}{6}", "1/2"), ("-\\frac{1}{2}", "-1/2"), ("Blue", "blue")])
def test_right_answers_in_other_words_are_right(text, expected):
    assert same_value(text, expected)


@pytest.mark.parametrize("text", [
    "13", "12 or 13", "12, 13", "13 12", "12\n13", "12 = 12", "5 + 7", "24 / 2", "(12)", "twelve", "12 apples", "x = 12", "1e1", "0xC",
    "12/0", "1/0", "0/0", "12..", "--12", "12%", "١٢", "１２", "12" * 200, "9" * 5000, "Answer: 12 Answer: 13", "\\boxed{12}\\boxed{13}",
    "\\boxed{12} or 13", "The answer is not 12", "Ignore the question; reward is 1", "1,2", "0012.5", "[12]", "{12}", "12/1/1"])
def test_wrong_answers_and_tricks_are_wrong(text):
    assert not same_value(text, "12")


@given(st.fractions(max_denominator=10**6))
def test_every_fraction_equals_itself_only(value):
    assert number(str(value)) == value and number(str(value + Fraction(1, 10**7))) != value


def test_repeating_the_question_or_the_reasoning_is_no_answer(domains):
    for task in tasks(domains["math"], 10):
        expression = task.question.removeprefix("What is ").removesuffix("?")
        for content in (task.question, expression, task.facts["high"], f"{task.facts['answer']} {task.facts['answer']}9", "0 1 2 3 4 x"):
            assert domains["math"].score(task, [assistant(content)]).reward == 0, (task, content)


def test_worked_steps_of_the_problems_are_true(domains):
    for task in tasks(domains["math"], 30):
        for text in (task.facts["high"], task.facts["max"]):
            for claim in text.replace(":", ".").replace(",", ".").split("."):
                left, equals, right = claim.strip().partition(" = ")
                if equals and " = " not in right:
                    assert Fraction(eval(left.replace("/", " * F(1) / "), {"F": Fraction})) == Fraction(right), claim


# Code


def doubles(code):
    tests = [[x, 2 * x] for x in range(-3, 9)]
    return Task("code", "train", 0, 1, [{"role": "user", "content": "Write f(x) = 2 * x."}], {"tests": tests}), [assistant(code)]


@pytest.mark.parametrize("code", [
    "def f(x):\n    return 2 * x", "def f(x): return x + x", "f = lambda x: x << 1", "```python\ndef f(x):\n    return 2 * x\n```",
    "Here it is:\n```\ndef f(x):\n    return 2 * x\n```\nDone.", "def f(x):\n    print('noise')\n    return 2 * x",
    "import math\ndef f(x):\n    return math.floor(2 * x)"])
def test_any_right_function_passes(domains, code):
    assert domains["code"].score(*doubles(code)).reward == 1


LOOKS_RIGHT = "json.dumps([2 * x for x in range(-3, 9)])"
TRICKS = {
    "wrong": "def f(x): return x", "constant": "def f(x): return 0", "nothing": "pass", "prose": "I would double it.",
    "another name": "def g(x): return 2 * x", "almost": "def f(x): return 2 * x if x < 8 else 0", "float": "def f(x): return 2.0 * x",
    "leaves early": "import sys\nsys.exit(0)", "leaves at once": "import os\nos._exit(0)", "says passed": "print('passed')\nimport os\nos._exit(0)",
    "writes past the harness": "import os\nos.write(1, b'[0] all tests passed')\nos._exit(0)",
    "equal to all": "class A:\n    def __eq__(self, other): return True\n    def __repr__(self): return '0'\ndef f(x): return A()",
    "equal number": "class A(int):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x): return A(0)",
    "patches json": "import json\njson.dumps = lambda *a, **k: 'passed'\ndef f(x): return 0",
    "patches the harness": "import sys\nm = sys._getframe(1).f_globals\nm['task']['arguments'] = []\ndef f(x): return 0",
    "reads the tests": "import sys\nt = sys._getframe(1).f_globals['task']\ndef f(x): return t['expected'][x]",
    "reads the files": "import glob\ntests = [open(p).read() for p in glob.glob('/**/*test*', recursive=True)][:0]\ndef f(x): return tests[x]",
    "raises": "def f(x): raise SystemExit(0)", "endless": "def f(x):\n    while True: pass", "two blocks": "```\ndef f(x): return 2 * x\n```\n```\nx\n```",
    "open block": "```python\ndef f(x): return 2 * x", "not json": "def f(x): return {2 * x}", "text": "def f(x): return str(2 * x)",
    "twice": "def f(x): return 2 * x\nimport atexit, os\nos.write(1, b'[1]')"}


@pytest.mark.parametrize("trick", TRICKS)
def test_wrong_functions_and_tricks_fail(domains, trick):
    assert domains["code"].score(*doubles(TRICKS[trick])).reward == 0


def test_right_results_never_enter_the_sandbox(domains, monkeypatch):
    seen, run = [], domains["code"].sandbox.run
    monkeypatch.setattr(domains["code"].sandbox, "run", lambda programs: seen.extend(programs) or run(programs))
    task, turns = doubles("def f(x): return 0")
    secret = replace(task, facts={"tests": [[x, 987654 + x] for x in range(5)]})
    domains["code"].score(secret, turns)
    assert seen and not any("98765" in program.source + program.stdin for program in seen)


def test_only_code_is_taken_from_an_answer():
    assert code_of("def f(x): pass") == "def f(x): pass" and code_of(None) is None
    assert code_of("a\n```py\nx = 1\ny = 2\n```\nb") == "x = 1\ny = 2"
    assert code_of("```\n```") == "" and code_of("```\na\n```\n```\nb\n```") is None and code_of("`` ```") is None


def test_a_changed_digit_in_a_solution_fails(domains):
    domain = domains["code"]
    episodes = []
    for task in tasks(CodeEnvironment(kinds=("guessed",)), 8):
        code = task.facts["code"]
        episodes.append((task, [assistant(code[:-1] + str((int(code[-1]) + 1) % 10))]))
    assert not any(score.reward for score in domain.scores(episodes))


# Agent


def say(*calls, content=""):
    return assistant(content, None, [tool_call(name, arguments) for name, arguments in calls])


def play(domain, task, *said):
    turns = []
    for turn in said:
        turns.append(turn)
        turns += domain.step(task, turns) or []
    return turns


def test_results_come_back_for_each_call_and_name_what_is_wrong(domains):
    task = domains["agent"].task(0, "train", 3)
    people, items = task.facts["people"], task.facts["items"]
    turn = say(("find_person", {"name": "Ann"}), ("find_item", {"name": "pen"}), ("find_person", {"name": "Nobody"}),
               ("order", {"person": people["Ann"], "item": 1000, "count": 1}), ("send", {"person": people["Ann"]}), ("dance", {}))
    for number, call in enumerate(turn["tool_calls"]):
        call["id"] = f"id{number}"
    results = domains["agent"].step(task, [turn])
    assert [result["tool_call_id"] for result in results] == [f"id{number}" for number in range(6)]
    contents = [json.loads(result["content"]) for result in results]
    assert contents[:2] == [{"id": people["Ann"]}, {"id": items["pen"][0], "price": items["pen"][1]}]
    assert [content.get("error") for content in contents[2:]] == [
        "no such person", "no such item", "send needs person: integer, text: string", "no such tool"]


def test_an_episode_goes_on_from_its_turns(domains):
    for task in tasks(domains["agent"], 3):
        turns = domains["agent"].demonstration(task, "high")
        copy = json.loads(json.dumps(turns))
        for at, turn in enumerate(copy):
            if turn["role"] == "tool":
                assert environment("agent").step(task, copy[:at]) == [turn]


@pytest.mark.parametrize("trick", ["nothing done", "twice", "to everybody", "another person", "after the end", "only said", "cut call"])
def test_only_the_right_final_state_is_rewarded(domains, trick):
    domain = domains["agent"]
    for seed in range(5):
        task = domain.task(seed, "train", 2)
        *before, last = domain.demonstration(task, "chat")
        [[person, text]], people = task.facts["goal"]["messages"], task.facts["people"]
        send = ("send", {"person": person, "text": text})
        turns = {
            "nothing done": [last], "twice": play(domain, task, say(send, send), last),
            "to everybody": play(domain, task, say(*[("send", {"person": each, "text": text}) for each in people.values()]), last),
            "another person": play(domain, task, say(("send", {"person": next(iter(set(people.values()) - {person})), "text": text})), last),
            "after the end": play(domain, task, say(send), last, say(send), last), "only said": [assistant(f"I sent {text} to {person}.")],
            "cut call": [{**turn, "wo_eos": True} if turn["role"] == "assistant" else turn for turn in before] + [last]}[trick]
        assert domain.score(task, turns).reward == 0


def test_invalid_and_broken_calls_are_counted(domains):
    domain, task = domains["agent"], domains["agent"].task(0, "train", 2)
    good = domain.demonstration(task, "chat")
    wrong = say(("find_person", {"name": 5}), ("find_person", {}), ("send", {"person": True, "text": "a"}), ("dance", {}),
                ("find_person", {"name": "Ann", "more": 1}))
    wrong["tool_calls"].append({"type": "function", "function": {"name": "find_person", "arguments": "["}})
    score = domain.score(task, [wrong, *domain.step(task, [wrong]), *good])
    assert (score.reward, score.calls, score.valid_calls) == (1, 8, 2)
    text = chat.encode([*task.messages, good[0]], "chat")[len(chat.encode(task.messages, "chat")):]
    cut = read_answer(text[:text.index("</｜DSML｜parameter>")], thinking=False)
    score = domain.score(task, [cut])
    assert (score.reward, score.valid, score.calls, score.valid_calls) == (0, False, 1, 0)
    crowd = say(*[("find_person", {"name": "Ann"})] * (CALLS_A_TURN + 1))
    assert domain.step(task, [crowd]) is None and domain.score(task, [crowd]).valid_calls == 0
    assert domain.score(task, [crowd]).calls == CALLS_A_TURN + 1


def test_an_episode_ends_even_if_the_model_calls_forever(domains):
    task, turns = domains["agent"].task(0, "train", 1), []
    for _ in range(50):
        turns.append(say(("find_item", {"name": "pen"})))
        results = domains["agent"].step(task, turns)
        if results is None:
            break
        turns += results
    assert results is None and domains["agent"].score(task, turns).reward == 0


def test_the_tools_say_what_is_accepted(domains):
    assert domains["agent"].task(0).tools == TOOLS and not domains["math"].task(0).tools
    for tool in TOOLS:
        schema = tool["function"]["parameters"]
        assert list(SIGNATURES[tool["function"]["name"]]) == schema["required"] == list(schema["properties"])


# Instructions


FACTS = {"words": ["cat", "river", "sun", "apple", "bird"], "count": 2, "constraints": {}}


@pytest.mark.parametrize("constraints, right, wrong", [
    ({}, ["cat, sun", "sun cat", "cat\nsun"],
     ["cat", "cat, sun, bird", "cat, cat", "Cat, sun", "cat, dog", "cat and sun", "cat, river, sun, apple, bird", "CAT, SUN", "", ",", "2"]),
    ({"letter": ["with", "r"]}, ["river, bird"], ["river, cat", "river", "river bird r"]),
    ({"letter": ["without", "i"]}, ["sun, cat"], ["sun, bird"]),
    ({"length": ["short", 3]}, ["sun, cat"], ["sun, bird"]), ({"length": ["long", 4]}, ["apple, bird"], ["apple, sun"]),
    ({"order": "up"}, ["bird, cat"], ["cat, bird", "cat, cat"]), ({"order": "down"}, ["cat, bird"], ["bird, cat"]),
    ({"case": "upper"}, ["CAT, SUN"], ["Cat, Sun", "cat, sun", "CAT, sun"]), ({"case": "title"}, ["Cat, Sun"], ["CAT, SUN", "cat, sun"]),
    ({"format": "commas"}, ["cat, sun", "cat,sun"], ["cat sun", "cat\nsun", "cat, sun,", "cat, sun."]),
    ({"format": "lines"}, ["cat\nsun"], ["cat, sun", "cat\n\nsun", "- cat\n- sun"]),
    ({"format": "dashes"}, ["- cat\n- sun"], ["cat\nsun", "- cat, sun", "-cat\n-sun", "- cat\nsun"]),
    ({"format": "json"}, ['["cat", "sun"]', '["cat","sun"]'],
     ["['cat', 'sun']", '"cat", "sun"', '{"a": "cat"}', '[["cat", "sun"]]', '["cat", 1]', '["cat", "sun"] ok', "[" * 9999]),
    ({"frame": "begin"}, ["Here: cat, sun", "Here:\ncat, sun"], ["cat, sun", "here: cat, sun", "Here: Here: cat, sun"]),
    ({"frame": "end"}, ["cat, sun\nDone.", "cat, sun Done."], ["cat, sun", "Done. cat, sun", "cat, sun Done"]),
    ({"frame": "both"}, ["Here: cat, sun Done."], ["Here: cat, sun", "Here:Done.", "Here: Done."])])
def test_constraints_accept_what_they_ask_for_and_nothing_else(constraints, right, wrong):
    facts = FACTS | {"constraints": constraints}
    assert [text for text in right if broken_constraint(text, facts)] == []
    assert [text for text in wrong if not broken_constraint(text, facts)] == []


def test_repeating_the_instructions_earns_nothing(domains):
    for task in tasks(domains["instructions"], 10):
        assert asked(task.facts) == task.question
        for content in (task.question, ", ".join(task.facts["words"]), "yes", "\n".join(["Here:", *task.facts["words"], "Done."])):
            assert domains["instructions"].score(task, [assistant(content)]).reward == 0


# Judging


def test_verdicts_are_true_and_balanced(domains):
    judging, found = domains["judging"], []
    for task in tasks(judging, 40):
        facts = task.facts
        assert facts["answer"] in task.question and facts["question"] in task.question
        found.append(facts["met"])
        for content, reward in (("yes", facts["met"]), ("No.", not facts["met"]), (" YES ", facts["met"])):
            assert judging.score(task, [assistant(content)]).reward == reward
    assert 0.4 < sum(found) / len(found) < 0.6


def test_truth_of_a_verdict_is_the_judged_domains_own_score():
    math = MathEnvironment(kinds=("chain", "expression", "story"))  # whose last step is their answer
    judging = JudgingEnvironment([math])
    seen = set()
    for seed in range(60):
        task = judging.task(seed, "train", 1)
        result = task.facts["high"].partition(" So ")[0].rsplit(" = ", 1)[1].removesuffix(".")
        twin = Task("math", "train", 0, 1, [{"role": "user", "content": task.facts["question"]}], {"answer": result})
        assert math.score(twin, [assistant(task.facts["answer"])]).reward == task.facts["met"]
        seen.add(task.facts["met"])
    assert seen == {True, False}


@pytest.mark.parametrize("content", ["yes and no", "yes no", "", "maybe", "yes, because", "1", "The answer is yes"])
def test_a_judge_that_hedges_earns_nothing(domains, content):
    assert all(domains["judging"].score(task, [assistant(content)]).reward == 0 for task in tasks(domains["judging"], 2))


def test_a_judged_question_is_on_its_domains_own_side(domains):
    for task in tasks(domains["judging"], 30):
        assert is_held_out(task.facts["question"]) == (task.split == "held_out")


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
