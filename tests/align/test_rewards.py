"""What each domain rewards: right answers score 1, wrong ones and tricks score 0."""

import json
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fathom.align.environments import environment
from fathom.align.environments.agent import CALLS_A_TURN, SIGNATURES, TOOLS
from fathom.align.environments.base import Task, assistant, tool_call
from fathom.align.environments.code import CodeEnvironment, code_of
from fathom.align.environments.instructions import broken_constraint
from fathom.align.environments.instructions import question as asked
from fathom.align.environments.judging import JudgingEnvironment
from fathom.align.environments.math import MathEnvironment, number, same_value
from fathom.data.questions import is_held_out
from fathom.text import chat
from fathom.text.chat_stream import read_answer
from tests.align.conftest import tasks


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
