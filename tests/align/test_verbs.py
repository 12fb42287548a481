"""The verbs of post-training as a user meets them, in this process: happy paths, and one line for what cannot work."""

import json
import sys
from pathlib import Path

import pytest

from fathom.align.domains import Domains
from fathom.align.rollout import Draw
from fathom.align.sample import Mode
from fathom.align.scores import score
from fathom.checkpoint.released import load_model
from fathom.cli import main
from tests.align.toy import TOYS, micro_folder

RECIPES = Path(__file__).resolve().parents[2] / "recipes" / "pipeline"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return micro_folder(tmp_path_factory.mktemp("model") / "model")


def fathom(monkeypatch, capsys, *arguments):
    """Exit code and both outputs of a command."""
    monkeypatch.setattr(sys, "argv", ["fathom", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as left:
        code = left.code or 0
    return code, *capsys.readouterr()


def test_score_writes_a_row_for_each_environment_mode_and_budget(model, tmp_path, monkeypatch, capsys):
    code, out, err = fathom(monkeypatch, capsys, "score", model, "--environment", "math,instructions", "--tasks", 2, "--mode", "chat,high",
                            "--budgets", "2,4", "--max-tokens", 8, "--out", tmp_path / "rows.json")
    assert code == 0, err
    rows = json.loads((tmp_path / "rows.json").read_text())
    keys = [(row["environment"], row["effort"], row["budget"]) for row in rows]
    assert keys == [(name, *way) for name in ("math", "instructions") for way in (("chat", None), ("high", None), ("high", 2), ("high", 4))]
    assert all(0 <= row["score"] <= 1 and row["tasks"] == 2 and row["tokens"] <= 8 for row in rows) and "math" in out


def test_scores_are_repeatable_and_ask_held_out_tasks_only(model):
    asked = []

    class Spy(type(TOYS["letters"])):
        def task(self, seed, split="train", level=1):
            asked.append(split)
            return super().task(seed, split, level)

    runs = [score(model, ["letters"], {"letters": Spy()}, 3, [Mode("chat", 8)], [1, 2], draw=Draw(cache_mib=16), seed=seed) for seed in (0, 0, 1)]
    assert runs[0] == runs[1] != runs[2] and {*asked} == {"held_out"}


def test_average_makes_a_model_that_opens(model, tmp_path, monkeypatch, capsys):
    code, out, err = fathom(monkeypatch, capsys, "average", model, model, "--out", tmp_path / "mean")
    assert code == 0 and "done" in out, err
    assert load_model(tmp_path / "mean").config == load_model(model).config


@pytest.mark.parametrize("arguments, words", [
    (["score", "{model}", "--environment", "chess"], "environment 'chess' does not exist; allowed: math, code, agent, instructions, judging"),
    (["score", "{model}", "--environment", "math", "--mode", "deep"], "mode is 'deep'; allowed: chat, high, max"),
    (["score", "{model}", "--environment", "math", "--budgets", "few"], "budgets is 'few'"),
    (["score", "{tmp}/none", "--environment", "math"], "neither a model folder"),
    (["grpo", "{recipes}/grpo.toml", "--set", "base={tmp}/none"], "neither a model folder"),
    (["grpo", "{recipes}/grpo.toml", "--set", "polcy.kl=1"], "did you mean policy"),
    (["grpo", "{recipes}/grpo.toml", "--set", "group=1"], "group 1"),
    (["grpo", "{recipes}/grpo.toml", "--set", "base={model}", "--set", "run={tmp}/r", "--set", 'environments=["chess"]'], "'chess' does not exist"),
    (["grpo", "{recipes}/grpo.toml", "--resume", "--set", "run={tmp}/none"], "holds no run to resume"),
    (["distill", "{recipes}/distill.toml", "--set", 'samples="nobody"'], '"student" or "teachers"'),
    (["distill", "{recipes}/distill.toml", "--set", "base={model}", "--set", "run={tmp}/r"], "neither a model folder"),
    (["sft", "{recipes}/specialist.toml", "--set", "base={model}", "--set", "run={tmp}/r", "--set", "demonstrations.levels=[9]"], "math has 1 to 6"),
    (["pipeline", "{recipes}/grpo.toml"], "unknown key"),
    (["pipeline", "{recipes}/pipeline.toml", "--set", 'budget_environments=["maths"]'], "environment 'maths' does not exist"),
    (["average", "{tmp}/none", "--out", "{tmp}/x"], "neither a model folder"),
])
def test_what_cannot_work_is_one_line_and_exit_code_2(model, tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    code, _, err = fathom(monkeypatch, capsys, *(text.format(model=model, tmp=tmp_path, recipes=RECIPES) for text in arguments))
    assert code == 2 and words in err and err.startswith("fathom: ") and err.count("\n") == 1, err


def test_the_built_in_environments_are_made_when_asked_for():
    found = Domains()
    assert [*found] == ["math", "code", "agent", "instructions", "judging", "judged-math"] and "chess" not in found
    assert found["math"] is found["math"] and found["math"].name == "math"
