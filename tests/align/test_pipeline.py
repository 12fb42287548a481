"""The pipeline: its recipes fit its stages, order, markers, failures and kills, and a report that says what the scores say."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from rich.console import Console

from fathom import recipe as recipes
from fathom.align import pipeline_report
from fathom.align.distill import Distill
from fathom.align.domains import Domains
from fathom.align.grpo import Grpo
from fathom.align.pipeline import Pipeline, Size, plain_text, prepare_corpus, run_pipeline, stages
from fathom.align.pipeline_report import checks, gather_scores, mean_of, variant_rows
from fathom.align.pipeline_runner import Runner, StageCommand, StageFailed
from fathom.align.sft import Sft
from fathom.config import ModelConfig
from fathom.errors import FathomError, RecipeError
from fathom.text.templates import MAX_EFFORT_PROMPT
from fathom.text.tokenizer import SPECIAL_TOKENS, Tokenizer
from fathom.train.pretrain import Pretrain
from tests.align.test_grpo import wait_for
from tests.align.toy import TOYS
from tests.runs import losses, micro_recipe

ROOT = Path(__file__).resolve().parents[2]
RECIPES = ROOT / "recipes" / "pipeline"
QUIET = Console(quiet=True)

# A stage that notes when it began and ended, waits for a file where one is named, fails or writes what it should make.
PROGRAM = textwrap.dedent("""
    import os, pathlib, signal, sys, time
    name, makes, notes, gate, fails, *_ = sys.argv[1:]
    name += os.environ.get("RANK", "")
    def note(what):
        with open(notes, "a") as file: file.write(f"{what} {name}\\n")
    def save(*_):
        time.sleep(0.2)
        note("save")
        print("rank 0 of 2 lost another process of the run: it ended", flush=True)
        sys.exit(143)
    signal.signal(signal.SIGTERM, save)
    note("begin")
    while gate != "-" and fails != name and not pathlib.Path(gate).exists(): time.sleep(0.02)
    if fails in ("fails", name):
        print("out of luck"); sys.exit(3)
    pathlib.Path(makes).parent.mkdir(parents=True, exist_ok=True)
    pathlib.Path(makes).write_text(name)
    note("end")
""")


class Scripted(Runner):
    program = (sys.executable, "-c", PROGRAM)


def stage(folder, name, after=(), gate="-", fails="-"):
    makes = folder / "made" / name
    return StageCommand(name, (name, str(makes), str(folder / "notes"), str(gate), fails), tuple(after), makes)


def notes(folder):
    return (folder / "notes").read_text().splitlines() if (folder / "notes").exists() else []


def diamond(folder, **options):
    return [stage(folder, "a"), stage(folder, "b", ["a"]), stage(folder, "c", ["a"]), stage(folder, "d", ["b", "c"], **options)]


def test_rows_with_more_tasks_take_the_place_of_others_and_budgets_stand_behind_them(tmp_path):
    def put(folder, *rows):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "flash.distilled.json").write_text(json.dumps([dict(zip(("environment", "effort", "budget", "tasks"), row, strict=True)) for row in rows]))

    put("scores", ("math", "chat", None, 100), ("math", "high", None, 100), ("code", "high", None, 100))
    put("claims", ("math", "high", None, 400))
    put("budgets", ("math", "high", None, 100), ("math", "high", 8, 100))
    rows = [tuple(row.values()) for row in gather_scores(tmp_path)["flash.distilled"]]
    assert rows == [("math", "chat", None, 100), ("code", "high", None, 100), ("math", "high", None, 400), ("math", "high", 8, 100)]


def test_the_recipes_in_the_tree_fit_every_stage():
    recipe = recipes.load(Pipeline, RECIPES / "pipeline.toml", ["judge=true"])
    found = stages(recipe, RECIPES)
    kinds = {"train": Pretrain, "sft": Sft, "grpo": Grpo, "distill": Distill}
    names = [stage.name for stage in found]
    assert len({*names}) == len(names) and all(names.index(before) < number for number, stage in enumerate(found) for before in stage.after)
    for one in found:
        verb, path, *rest = one.arguments
        if verb in kinds:
            settings = recipes.load(kinds[verb], path, rest[1::2])
            assert Path(settings.run) == one.makes and rest[0::2] == ["--set"] * (len(rest) // 2)
    base = next(stage for stage in found if stage.name == "pro/base")
    assert base.ranks == recipes.load(Pretrain, base.arguments[1], base.arguments[3::2]).parallel.data == 2 == recipe.workers
    assert names.index("pro/student") < names.index("pro/sft-math")  # what comes last waits for the student
    started = next(stage for stage in found if stage.name == "pro/sft-agent")
    assert started.after == ("pro/student",) and "base=\"runs/pipeline/pro/student\"" in started.arguments  # all begin where the student does
    grpo = next(stage for stage in found if stage.name == "pro/grpo-agent")
    assert grpo.arguments[1].endswith("grpo-agent.toml") and grpo.after == ("pro/sft-agent",)
    distilled = next(stage for stage in found if stage.name == "flash/distilled")  # taught by the specialists of pro
    assert {"flash/student", "pro/grpo-math", "pro/grpo-agent"} <= set(distilled.after)
    judge = next(stage for stage in found if stage.name == "score/pro/judge")
    assert "judging,judged-math" in judge.arguments and "flash/judge" not in names
    assert not any(name.startswith("flash/grpo") for name in names) and {f"score/{name}" for name in names if not name.startswith(("score", "budgets", "claim"))} < {*names}
    claim = next(stage for stage in found if stage.name == "claim/pro/sft-code")
    assert claim.arguments[3] == "code" and claim.arguments[5] == str(recipe.claim_tasks) and claim.arguments[7] == "high" and "claim/pro/distilled" in names
    assert not {"claim/pro/base", "claim/flash/distilled", "claim/pro/judge"} & {*names}
    modes = {name: next(stage for stage in found if stage.name == f"score/{name}").arguments[7] for name in ("pro/distilled", "pro/mixed", "pro/sft-code", "flash/distilled")}
    assert modes == {"pro/distilled": "chat,max", "pro/mixed": "chat", "pro/sft-code": "chat,high", "flash/distilled": "chat,high,max"}  # high is the claim's
    budgets = next(stage for stage in found if stage.name == "budgets/pro/distilled")
    assert budgets.arguments[3] == "math" and budgets.makes.name == "pro.distilled.json" and budgets.arguments[-1] == "8,16,32,64"
    teachers = recipes.load(Distill, distilled.arguments[1], distilled.arguments[3::2]).teachers
    assert [(teacher.weight, teacher.share) for teacher in teachers] == [*zip(recipe.teacher_weights, recipe.teacher_shares, strict=True)]
    for size in recipe.sizes:
        config = ModelConfig.load(RECIPES / size.model)
        assert config.sliding_window == 256 and config.vocab_size == recipe.vocabulary


def test_stages_run_after_those_they_need_and_only_once(tmp_path):
    Scripted(tmp_path, diamond(tmp_path), 2, QUIET).run()
    order = notes(tmp_path)
    assert order[:2] == ["begin a", "end a"] and order[-2:] == ["begin d", "end d"] and len(order) == 8
    Scripted(tmp_path, diamond(tmp_path), 2, QUIET).run()
    assert len(notes(tmp_path)) == 8
    (tmp_path / "made" / "c").write_text("damaged")
    Scripted(tmp_path, diamond(tmp_path), 2, QUIET).run()
    assert notes(tmp_path)[8:] == ["begin c", "end c"] and (tmp_path / "made" / "c").read_text() == "c"
    marker = json.loads((tmp_path / "stages" / "c.json").read_text())
    assert marker["seconds"] > 0


def test_what_was_made_from_other_inputs_is_made_anew(tmp_path):
    Scripted(tmp_path, diamond(tmp_path), 2, QUIET).run()
    other = [stage(tmp_path, "a"), StageCommand("b", ("b2", *diamond(tmp_path)[1].arguments[1:]), ("a",), tmp_path / "made" / "b"),
             *diamond(tmp_path)[2:]]
    Scripted(tmp_path, other, 2, QUIET).run()
    assert notes(tmp_path)[8:] == ["begin b2", "end b2", "begin d", "end d"]


def test_a_folder_that_was_moved_keeps_what_was_made_in_it(tmp_path, monkeypatch):
    (tmp_path / "old").mkdir()
    for name in ("old", "new"):
        monkeypatch.chdir(tmp_path)
        if name == "new":
            (tmp_path / "old").rename(tmp_path / "new")
        monkeypatch.chdir(tmp_path / name)
        Scripted(Path("run"), diamond(Path.cwd()), 2, QUIET).run()
    assert len(notes(tmp_path / "new")) == 8


def test_a_stage_whose_files_changed_runs_again(tmp_path):
    (tmp_path / "corpus").write_text("one")
    reading = StageCommand(*dataclasses.astuple(stage(tmp_path, "a"))[:4], reads=(tmp_path / "corpus",))
    for text, runs in (("one", 1), ("one", 1), ("two", 2)):
        (tmp_path / "corpus").write_text(text)
        Scripted(tmp_path, [reading], 2, QUIET).run()
        assert notes(tmp_path).count("end a") == runs


def test_two_run_at_a_time(tmp_path):
    gate = tmp_path / "gate"
    many = [stage(tmp_path, name, gate=gate) for name in "xyz"]
    runner = Scripted(tmp_path, many, 2, QUIET)
    runner._start()
    wait_for(lambda: len(notes(tmp_path)) == 2)
    runner._start()
    assert len(runner.running) == 2
    gate.write_text("")
    runner.run()
    assert sorted(notes(tmp_path)) == sorted(f"{word} {name}" for name in "xyz" for word in ("begin", "end"))


def test_what_others_wait_for_goes_first(tmp_path):
    found = [stage(tmp_path, "a"), stage(tmp_path, "score", "a"), stage(tmp_path, "b", "a"), stage(tmp_path, "c", "b")]
    Scripted(tmp_path, found, 1, QUIET).run()
    assert notes(tmp_path)[::2] == ["begin a", "begin b", "begin score", "begin c"]


def wide(folder, name, after=(), **options):
    return dataclasses.replace(stage(folder, name, after, **options), ranks=2)


def test_ranks_of_a_stage_run_together_and_what_comes_after_them_waits(tmp_path):
    gate = tmp_path / "gate"
    runner = Scripted(tmp_path, [stage(tmp_path, "a", gate=gate), wide(tmp_path, "b", gate=gate), stage(tmp_path, "c", gate=gate)], 2, QUIET)
    runner._start()
    assert [one.name for one in runner.running] == ["a"]  # b needs two cores; c does not take the one that b waits for
    gate.write_text("")
    runner.run()
    order = notes(tmp_path)
    assert order[:2] == ["begin a", "end a"] and sorted(order[2:6]) == ["begin b0", "begin b1", "end b0", "end b1"] and order[6:] == ["begin c", "end c"]
    Scripted(tmp_path / "one", [wide(tmp_path, "d")], 1, QUIET).run()  # more than there are cores: alone
    assert sorted(notes(tmp_path)[8:]) == ["begin d0", "begin d1", "end d0", "end d1"]


def test_a_failed_rank_ends_the_others(tmp_path):
    with pytest.raises(StageFailed, match=r"stage a failed \(out of luck\)"):  # of both last lines the one that says why
        Scripted(tmp_path, [wide(tmp_path, "a", gate=tmp_path / "never", fails="a1")], 2, QUIET).run()
    assert "save a0" in notes(tmp_path) or "begin a0" not in notes(tmp_path)  # ended before it could begin


def test_ranks_train_together(tmp_path):
    recipe = micro_recipe(tmp_path, steps=4, warmup_steps=1, decay_steps=2)
    train = StageCommand("base", ("train", str(recipe), "--set", "parallel.data=2"), (), tmp_path / "run", ranks=2)
    Runner(tmp_path, [train], 2, QUIET).run()
    assert len(losses(tmp_path / "run")) == 4
    Runner(tmp_path, [train], 2, QUIET).run()
    assert (tmp_path / "stages" / "base.log").read_text().count("step 4:") == 1  # not run again


def test_a_failed_stage_is_named_with_its_last_line_and_the_rest_goes_on_later(tmp_path):
    with pytest.raises(StageFailed, match=r"stage d failed \(out of luck\); its output is in .*d\.log"):
        Scripted(tmp_path, diamond(tmp_path, fails="fails"), 2, QUIET).run()
    Scripted(tmp_path, diamond(tmp_path), 2, QUIET).run()  # another command: d alone runs again
    begun = [note.removeprefix("begin ") for note in notes(tmp_path) if note.startswith("begin")]
    assert sorted(begun) == ["a", "b", "c", "d", "d"] and notes(tmp_path)[-1] == "end d"


KILLED = """
import sys
from pathlib import Path
from tests.align.test_pipeline import QUIET, Scripted, diamond
folder = Path(sys.argv[1])
Scripted(folder, diamond(folder, gate=folder / "gate"), 2, QUIET).run()
"""


def test_a_killed_pipeline_takes_its_stages_along_and_goes_on_where_it_was(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for(lambda: "begin d" in notes(tmp_path))
    process.send_signal(signal.SIGKILL)
    process.wait()
    (tmp_path / "gate").write_text("")
    Scripted(tmp_path, diamond(tmp_path, gate=tmp_path / "gate"), 2, QUIET).run()
    assert notes(tmp_path)[-2:] == ["begin d", "end d"] and notes(tmp_path).count("begin a") == 1
    if sys.platform == "linux":
        assert notes(tmp_path).count("end d") == 1  # the first d died with its pipeline


def test_sigterm_lets_stages_save(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for(lambda: "begin d" in notes(tmp_path))
    process.send_signal(signal.SIGTERM)
    assert process.wait() and notes(tmp_path)[-1] == "save d"


def micro(tmp_path, **changes):
    return Pipeline(**dict(run=str(tmp_path / "run"), sizes=(Size("flash", "m.json"), Size("pro", "m.json", False)), environments=("letters", "looking"),
                           documents=(6,), vocabulary=420, tasks=2) | changes)


def test_the_corpus_is_plain_text_and_made_once_for_a_recipe(tmp_path):
    recipe = micro(tmp_path, documents=(4, 8), repeats=5)
    (tmp_path / "run").mkdir()
    prepare_corpus(recipe, tmp_path, TOYS, QUIET)
    texts = [json.loads(line)["text"] for line in (tmp_path / "run" / "corpus.jsonl").read_text().splitlines()]
    assert len(texts) == 17 and sum("<invoke name=" in text for text in texts) == 8 and not any("tool name and parameter schema" in text for text in texts)
    assert not any(token in text for text in texts for token in SPECIAL_TOKENS)
    assert any("<invoke name=" in text and "<tool_result>" in text for text in texts)
    assert not any(MAX_EFFORT_PROMPT.strip() in text for text in texts)
    first = Tokenizer.load(tmp_path / "run" / "tokenizer").fingerprint
    made = (tmp_path / "run" / "corpus.jsonl").stat()
    prepare_corpus(micro(tmp_path, documents=(4, 8), repeats=5, tasks=9), tmp_path, TOYS, QUIET)
    assert (tmp_path / "run" / "corpus.jsonl").stat() == made
    prepare_corpus(micro(tmp_path, documents=(3,)), tmp_path, TOYS, QUIET)
    assert len((tmp_path / "run" / "corpus.jsonl").read_text().splitlines()) == 6
    assert Tokenizer.load(tmp_path / "run" / "tokenizer").fingerprint != first
    task = Domains()["math"].task(1)
    assert task.question in plain_text(task.messages + Domains()["math"].demonstration(task, "high"), "thinking")


def test_recipes_that_cannot_work_are_refused(tmp_path):
    for changes in (dict(sizes=()), dict(sizes=(Size("pro", "m.json", False),)), dict(tasks=0), dict(sizes=(Size("pro", "m.json", ranks=0),)), dict(repeats=-1), dict(documents=(1, 2, 3)),
                    dict(teacher_weights=(0.0,)), dict(teacher_shares=(0,)), dict(teacher_shares=(1, 2, 3))):
        with pytest.raises(RecipeError):
            micro(tmp_path, **changes)
    with pytest.raises(RecipeError, match="base.toml is missing"):
        stages(micro(tmp_path), tmp_path)


def test_a_pipeline_with_an_unknown_environment_or_without_a_recipe_makes_no_folder(tmp_path):
    for recipe, root, complaint in ((micro(tmp_path, environments=("chess",)), RECIPES, "chess"), (micro(tmp_path), tmp_path, "base.toml is missing")):
        with pytest.raises(FathomError, match=complaint):
            run_pipeline(recipe, root, TOYS, lambda recipe: tmp_path, QUIET)
    assert not [*tmp_path.iterdir()]


def row(environment, effort, value, budget=None, calls=0, valid=0):
    return {"environment": environment, "effort": effort, "budget": budget, "tasks": 2, "score": value, "error": 0.0, "solved": value,
            "tokens": 3.0, "cut": 0.0, "invalid": 0.0, "calls": calls, "valid_calls": valid}


def fabricated(student=0.95):
    names = ("math", "agent")
    scores = {f"flash.sft-{name}": [row(name, "high", 0.5)] for name in names}
    scores |= {f"flash.grpo-{name}": [row(name, "high", 0.9 if name == "math" else 0.6)] for name in names}
    scores["flash.distilled"] = [row("math", "chat", 0.3), row("math", "high", student), row("math", "max", 0.97), row("agent", "high", 0.58, calls=100,
                                 valid=99), row("math", "high", 0.4, 8), row("math", "high", 0.8, 64)]
    scores["flash.base"] = [row("math", "chat", 0.0)]
    return scores


def test_the_report_holds_claims_against_the_scores(tmp_path):
    recipe = micro(tmp_path, environments=("math", "agent"), budgets=(8, 64))
    found = {claim: (measured, holds) for claim, measured, holds in checks(recipe, fabricated())}
    assert found["GRPO gains 15 points over SFT in math"] == ("50.0% → 90.0%", True)
    assert found["GRPO gains 15 points over SFT in agent"] == ("50.0% → 60.0%", False)
    assert found["the distilled student keeps 95% of the specialist's score in agent"] == ("58.0% of 60.0%", True)
    assert found["thinking beats answering at once in math"][1] and found["a thinking budget of 64 beats 8 in math"][1]
    assert found["over 98% of the student's tool calls are valid"] == ("99 of 100", True)
    assert not dict((claim, holds) for claim, _, holds in checks(recipe, fabricated(0.8)))["the distilled student keeps 95% of the specialist's score in math"]
    rows = variant_rows(recipe, fabricated())
    assert [cells[0] for cells in rows] == ["Flash-Base", "Flash", "Flash-Max", "Pro-Base", "Pro", "Pro-Max"]
    assert rows[2] == ["Flash-Max", "flash/distilled", "max", "97.0%", "-"] and rows[3][3:] == ["-", "-"]
    assert mean_of(fabricated()["flash.distilled"], "math", "high", 8)["score"] == 0.4


def test_the_page_has_all_tables_and_pictures(tmp_path, monkeypatch):
    recipe = micro(tmp_path, environments=("math", "agent"), budgets=(8, 64))
    run = tmp_path / "run"
    (run / "scores").mkdir(parents=True)
    judged = {"flash.judge": [row("judging", "high", 0.875), row("judged-math", "high", 0.5)]}
    (run / "flash" / "judge").mkdir(parents=True)
    (run / "flash" / "judge" / "metrics.jsonl").write_text('{"step": 1, "judge_agreement": 0.5}\n')
    for name, rows in (fabricated() | judged).items():
        (run / "scores" / f"{name}.json").write_text(json.dumps(rows))
    (run / "stages").mkdir()
    (run / "stages" / "flash.base.json").write_text(json.dumps({"seconds": 90}))
    (run / "seconds").write_text("4356.0\n")
    for size in ("flash", "pro"):
        shutil.copytree(RECIPES, run / size / "distilled", ignore=lambda folder, names: [name for name in names if name != "small-flash.json"])
        (run / size / "distilled" / "small-flash.json").rename(run / size / "distilled" / "config.json")
    (run / "flash" / "grpo-math").mkdir()
    (run / "flash" / "grpo-math" / "metrics.jsonl").write_text('{"step": 1, "score": 0.1}\n{"step": 2, "score": 0.4}\n')
    (run / "flash" / "sft-math").mkdir()
    (run / "flash" / "sft-math" / "recipe.toml").write_text("[demonstrations]\ncareless = 0.5\n")
    page = pipeline_report.write_report(recipe).read_text()
    assert "Of the demonstrations, 50% leave the last thing out." in page
    assert page.count("<img") == 2 and "Flash-Max" in page and "GRPO math" in page and "1.5" in page and "2.36M parameters" in page
    assert "87.5%" in page and "50.0% in the first 1 updates" in page
    report = json.loads((run / "report.json").read_text())
    assert report["variants"][2][3] == "97.0%" and report["minutes"] == 72.6 and "from start to end, 2 stages at a time</td><td>72.6" in page
