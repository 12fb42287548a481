"""Distillation: teachers' states stored and read back exactly, the student becomes them, kills change nothing; averages."""

import signal
from dataclasses import replace

import pytest
import torch
from rich.console import Console

from fathom import recipe as recipes
from fathom.align.curriculum import choose_tasks
from fathom.align.distill import Distill, Pupil, Teacher, average, distill
from fathom.align.grpo import Pace
from fathom.align.rollout import play_here
from fathom.align.rollout_log import RolloutLog
from fathom.align.sample import Mode
from fathom.checkpoint.released import load_model, save_model
from fathom.errors import CheckpointError, RecipeError
from fathom.text.tokenizer import Tokenizer
from fathom.train.loop import Loop
from fathom.train.tracking import read_metrics
from tests.align.test_grpo import start, wait_for, weights, written
from tests.align.toy import TOYS, micro_folder, run
from tests.runs import losses

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A student, and two teachers: one of another width."""
    folder = tmp_path_factory.mktemp("models")
    return [micro_folder(folder / "student", 0), micro_folder(folder / "one", 1), micro_folder(folder / "two", 2, moe_intermediate_size=16)]


def recipe(models, run, **changes):
    student, one, two = map(str, models)
    settings = dict(run=str(run), base=student, teachers=(Teacher(one, ("letters",)), Teacher(two, ("other",), 2.0)), pace=Pace(3, 2, 0.01),
                    modes=(Mode("chat", 10),), prompts=8, row_tokens=48, loop=Loop(checkpoint_every=3, keep_checkpoints=2))
    return Distill(**settings | changes)


def pupil_of(recipe):
    environments = {name: TOYS[name] for teacher in recipe.teachers for name in teacher.environments}
    return Pupil(recipe, load_model(recipe.base), Tokenizer.load(recipe.base), environments)


def test_the_loss_is_the_exact_divergence_from_the_teacher_of_each_samples_domain(models, tmp_path):
    pupil = pupil_of(recipe(models, tmp_path))
    (batch, _) = pupil.make_round(0, RolloutLog(tmp_path / "log", {}))
    teacher_N = batch.numbers["teacher_U"][batch.sample_N]
    assert teacher_N.tolist() == sorted(teacher_N.tolist()) and teacher_N.unique().tolist() == [0, 1]
    found = pupil.loss(batch, 0)
    with torch.no_grad():
        def logs(model):
            return model(batch.tokens_BS, position_BS=batch.positions_BS).logits[batch.learned_BS][:, :pupil.known].log_softmax(-1)
        student, teachers = logs(pupil.model), [logs(load_model(teacher.run)) for teacher in pupil.recipe.teachers]
        kl = [(student.exp() * (student - teacher)).sum(-1)[teacher_N == number].mean() for number, teacher in enumerate(teachers)]
    assert found.parts["loss"] == pytest.approx(float(kl[0] + 2 * kl[1]) / 3, abs=1e-4)
    assert [found.parts["kl_letters"], found.parts["kl_other"]] == pytest.approx([*map(float, kl)], abs=1e-4)


def test_the_student_becomes_its_teachers(models, tmp_path):
    folder = distill(recipe(models, tmp_path / "run", pace=Pace(8, 2, 0.01), prompts=16), TOYS, False, QUIET)
    lines = [line for line in read_metrics(folder) if "loss" in line]
    assert lines[-1]["loss"] < 0.7 * lines[0]["loss"] and {"kl_letters", "kl_other", "reward", "tokens_per_rollout"} <= set(lines[0])


def test_environments_are_asked_by_their_teachers_share(models, tmp_path):
    one, two = (Teacher(str(path), (name,), share=share) for path, name, share in zip(models[1:], ("letters", "other"), (3, 1), strict=True))
    setup = recipe(models, tmp_path / "run", teachers=(one, two), prompts=8)
    asked = choose_tasks({name: TOYS[name] for name in ("letters", "other")}, setup.levels, setup.modes, 8, 0, 0, shares={"letters": 3})
    assert sorted(task.domain for task, _ in asked) == ["letters"] * 6 + ["other"] * 2
    seen = []

    def watched(model, tokenizer, rollouts, *others):
        seen.extend(rollout.task.domain for rollout in rollouts)
        return play_here(model, tokenizer, rollouts, *others)

    distill(replace(setup, pace=Pace(1, 1, 0.01)), TOYS, False, QUIET, watched)
    assert sorted(seen) == ["letters"] * 6 + ["other"] * 2


def test_off_policy_samples_are_the_teachers_own(models, tmp_path):
    pupil = pupil_of(recipe(models, tmp_path, samples="teachers", hidden="bfloat16"))
    batches = pupil.make_round(0, RolloutLog(tmp_path / "log", {"round": 0}))
    again = pupil_of(recipe(models, tmp_path, samples="teachers", hidden="bfloat16", base=str(models[1])))  # whoever the student is
    for one, other in zip(batches, again.make_round(0, RolloutLog(tmp_path / "log2", {"round": 0})), strict=True):
        assert torch.equal(one.tokens_BS, other.tokens_BS) and one.numbers["hidden_0"].dtype == torch.bfloat16


def test_killed_and_resumed_equals_unbroken_bit_for_bit(models, tmp_path):
    folders = tmp_path / "unbroken", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
    run("distill", written(recipe(models, folders[0] / "run"), folders[0]))
    path = written(recipe(models, folders[1] / "run"), folders[1])
    process = start("distill", path)
    wait_for((folders[1] / "run" / "rounds" / "round-000002.log").exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run("distill", path, resume=True)
    assert losses(folders[1] / "run") == losses(folders[0] / "run")
    assert weights(folders[1] / "run", 6) == weights(folders[0] / "run", 6)


def test_teachers_that_do_not_fit_are_named(models, tmp_path):
    with pytest.raises(RecipeError, match="one only; found letters, letters"):
        recipe(models, tmp_path, teachers=(Teacher("a", ("letters",)), Teacher("b", ("letters",))))
    stranger = micro_folder(tmp_path / "stranger", 3)
    Tokenizer.train(["quite another page of text"] * 3, 300).save(stranger)
    with pytest.raises(RecipeError, match="stranger has another tokenizer"):
        distill(recipe(models, tmp_path / "run", teachers=(Teacher(str(stranger), ("letters",)),)), TOYS, False, QUIET)
    text = recipes.dump(recipe(models, tmp_path))
    (tmp_path / "recipe.toml").write_text(text)
    assert recipes.load(Distill, tmp_path / "recipe.toml") == recipe(models, tmp_path)


def test_an_average_is_the_mean_of_all_weights(models, tmp_path):
    first = load_model(models[0])
    for parameter in first.parameters():
        parameter.data *= 2
    save_model(first, tmp_path / "other")
    Tokenizer.load(models[0]).save(tmp_path / "other")
    mean = load_model(average([str(models[0]), str(tmp_path / "other")], tmp_path / "mean"))
    original = load_model(models[0])
    for found, parameter in zip(mean.parameters(), original.parameters(), strict=True):
        torch.testing.assert_close(found, parameter * 1.5)
    with pytest.raises(CheckpointError, match="two has another shape"):
        average([str(models[0]), str(models[2])], tmp_path / "never")
