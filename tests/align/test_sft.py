"""Fine-tuning: the mask by construction in every mode, and tuning of a part: adapters and experts, merged and resumable."""

import signal

import pytest
import torch
from rich.console import Console

from fathom.align.environments.base import assistant
from fathom.align.environments.math import MathEnvironment
from fathom.align.pipeline_runner import Runner, StageCommand
from fathom.align.sft import Demonstrations, Sft, conversations, examples, fine_tune
from fathom.checkpoint.released import load_model
from fathom.checkpoint.training import find_model
from fathom.errors import CheckpointError, FathomError, RecipeError
from fathom.files import alone_in
from fathom.optim.lora import Lora, LoraOptimizer, lora_names
from fathom.optim.muon import AdamW, Muon
from fathom.optim.schedules import Schedule
from fathom.text.tokenizer import EOS, THINK, THINK_END, USER
from fathom.train.loop import Loop
from fathom.train.ranks import Parallel
from fathom.train.tracking import read_metrics
from tests.align.test_grpo import start, wait_for, weights, written
from tests.align.toy import TOYS, micro_folder, micro_tokenizer, run
from tests.models import random_model, small_config
from tests.runs import losses

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def tokenizer():
    return micro_tokenizer()


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return micro_folder(tmp_path_factory.mktemp("base") / "model")


TALK = [{"role": "system", "content": "SYS"}, {"role": "user", "content": "ASK1"},
        {"role": "assistant", "reasoning_content": "WHY1", "content": "SAY1"}, {"role": "user", "content": "ASK2"},
        {"role": "assistant", "reasoning_content": "WHY2", "content": "SAY2"}]


def split(example, tokenizer):
    """The learned and the read text of an example."""
    tokens, learned = example
    return [tokenizer.decode(token for token, flag in zip(tokens, learned, strict=True) if flag == wanted) for wanted in (True, False)]


def test_only_what_the_assistant_says_is_learned_without_thinking(tokenizer):
    (example,) = examples(TALK, "chat", tokenizer)
    learned, read = split(example, tokenizer)
    assert learned == f"SAY1{EOS}SAY2{EOS}"
    assert all(text in read for text in ("SYS", "ASK1", "ASK2", THINK_END)) and "SAY" not in read and "WHY" not in read


def test_reasoning_is_learned_and_where_it_is_dropped_later_each_turn_has_its_own_example(tokenizer):
    first, second = (split(example, tokenizer) for example in examples(TALK, "thinking", tokenizer))
    assert first[0] == f"WHY1{THINK_END}SAY1{EOS}" and second[0] == f"WHY2{THINK_END}SAY2{EOS}"
    assert first[1].endswith(THINK) and "SAY1" in second[1] and "WHY1" not in second[1] and USER in second[1]


@pytest.mark.parametrize("effort", ["chat", "high", "max"])
def test_a_conversation_with_tools_is_one_example_whose_results_are_read(tokenizer, effort):
    environment = TOYS["looking"]
    task = environment.task(5)
    mode = "chat" if effort == "chat" else "thinking"
    (example,) = examples(task.messages + environment.demonstration(task, effort), mode, tokenizer, "max" if effort == "max" else None)
    learned, read = split(example, tokenizer)
    assert learned.count("invoke name") == 2 and learned.count(EOS) == 3 and learned.endswith(task.facts["seen"] + EOS)
    assert read.count("<tool_result>") == 2 and "<tool_result>" not in learned and "Look twice." in read
    assert ("I look." in learned) == (effort != "chat") and ("Absolute maximum" in read) == (effort == "max")
    assert "I look." not in read


def recipe(base, run, **changes):
    settings = dict(run=str(run), base=str(base), demonstrations=Demonstrations(("letters",), 24),
        schedule=Schedule(6, 128, lengths=(64,), warmup_steps=1, decay_steps=2, peak_rate=0.01, final_rate=0.001),
        loop=Loop(checkpoint_every=2, validate_every=6))
    return Sft(**settings | changes)


def test_a_share_of_the_demonstrations_is_careless_and_of_the_held_out_ones_none(base, tmp_path):
    math = MathEnvironment()
    def answers(share, held_out):
        wanted = recipe(base, tmp_path / "run", demonstrations=Demonstrations(("math",), 200, efforts=("chat",), careless=share))
        return [row.messages[-1]["content"] for row in conversations(wanted, tmp_path, held_out, {"math": math})]

    math.demonstration, math.careless = (lambda task, effort: [assistant("1")]), (lambda task, effort: [assistant("2")])
    assert 50 < answers(0.4, False).count("2") < 110
    assert set(answers(1.0, False)) == {"2"} and set(answers(0.0, False)) == {"1"} == set(answers(1.0, True))


def changed(base, run):
    """Names of the parameters that a run has changed."""
    before, after = (dict(load_model(find_model(path)).named_parameters()) for path in (base, run))
    return {name for name in before if not torch.equal(before[name], after[name])}


def test_every_environment_can_have_a_count_of_its_own(base, tmp_path):
    wanted = Demonstrations(("letters", "looking"), 5, counts=(7, 2))
    rows = conversations(recipe(base, tmp_path / "run", demonstrations=wanted), tmp_path, False, TOYS)
    assert [sum(len(row.messages) > 3 for row in rows), len(rows)] == [2, 9]
    for counts, complaint in (((1, 2), "counts has 2 numbers for 1 environments"), ((0,), r"counts \[0\]")):
        with pytest.raises(RecipeError, match=complaint):
            Demonstrations(("letters",), counts=counts)


def test_a_run_that_another_process_trains_is_left_alone(base, tmp_path):
    with alone_in(tmp_path / "run"), pytest.raises(FathomError, match="another process works in"):
        fine_tune(recipe(base, tmp_path / "run"), tmp_path, False, QUIET, TOYS)
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_expert_only_tuning_changes_experts_and_nothing_else(base, tmp_path):
    names = changed(base, fine_tune(recipe(base, tmp_path / "run", tune="experts"), tmp_path, False, QUIET, TOYS))
    assert names and all(".experts." in name for name in names)


def test_lora_changes_what_it_adapts_by_low_rank_and_its_checkpoint_opens_like_any_model(base, tmp_path):
    folder = fine_tune(recipe(base, tmp_path / "run", tune="lora", lora=Lora(2, 8.0)), tmp_path, False, QUIET, TOYS)
    before, after = (dict(load_model(find_model(path)).named_parameters()) for path in (base, folder))
    names = changed(base, folder)
    assert names <= set(lora_names(before.items())) and any(".experts." in name for name in names)
    assert any(".attention." in name for name in names)
    for name in names:
        assert int(torch.linalg.matrix_rank((after[name] - before[name]).double(), rtol=1e-3).max()) <= 2
    curve = [loss for _, loss in losses(folder)]
    assert curve[-1] < curve[0]


def test_the_adapters_gradients_are_those_of_a_model_that_holds_them():
    model = random_model(small_config([4, 0], hidden_size=32, index_n_heads=2)).double().train()
    base = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = LoraOptimizer(model, base, Lora(3, 6.0), AdamW(), seed=1)
    generator = torch.Generator().manual_seed(0)
    for tensor in optimizer.thin.values():
        tensor.normal_(0, 0.1, generator=generator)
    optimizer.merge()
    tokens = torch.randint(0, 300, (2, 12), generator=generator)

    def loss():
        return model(tokens).logits.square().mean()

    loss().backward()
    optimizer.step(0.0)
    for name in ("blocks.0.attention.query_up.weight", "blocks.1.moe.experts.down"):
        for kind in ("down", "up"):
            thin = optimizer.thin[f"{name}.{kind}"]
            direction, values = torch.randn(thin.shape, generator=generator, dtype=thin.dtype), []
            for sign in (1, -1):
                thin.add_(direction, alpha=sign * 1e-6)
                optimizer.merge()
                values.append(float(loss().detach()))
                thin.sub_(direction, alpha=sign * 1e-6)
            assert float((thin.grad * direction).sum()) == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


def test_a_lora_run_that_was_killed_equals_an_unbroken_one(base, tmp_path):
    folders = tmp_path / "unbroken", tmp_path / "killed"
    for folder in folders:
        folder.mkdir()
    long = dict(tune="lora", schedule=Schedule(24, 128, lengths=(64,), warmup_steps=1, peak_rate=0.01, final_rate=0.001),
                loop=Loop(checkpoint_every=4, validate_every=24))
    run("sft", written(recipe(base, folders[0] / "run", **long), folders[0]))
    path = written(recipe(base, folders[1] / "run", **long), folders[1])
    process = start("sft", path)
    wait_for((folders[1] / "run" / "checkpoints" / "step-000004").exists)
    process.send_signal(signal.SIGKILL)
    process.wait()
    run("sft", path, resume=True)
    assert losses(folders[1] / "run") == losses(folders[0] / "run")
    assert weights(folders[1] / "run", 24) == weights(folders[0] / "run", 24)


def test_two_ranks_learn_what_one_process_learns(base, tmp_path):
    learned = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        wanted = recipe(base, folder / "run", demonstrations=Demonstrations(("math",), 24), muon=Muon(precision="float32"), parallel=Parallel(ranks),
                        schedule=Schedule(6, 512, lengths=(256,), warmup_steps=1, decay_steps=2, peak_rate=0.01, final_rate=0.001))
        Runner(folder, [StageCommand("sft", ("sft", str(written(wanted, folder))), (), folder / "run", ranks=ranks)], 2, QUIET).run()
        learned.append([loss for _, loss in losses(folder / "run")] + [float(line["validation_bits_per_byte"]) for line in read_metrics(folder / "run") if "validation_bits_per_byte" in line])
    assert len(learned[0]) == 7 and learned[1] == pytest.approx(learned[0], rel=1e-3) and learned[1] != learned[0]


def test_a_state_of_another_adapter_is_refused(base):
    model = load_model(base)
    optimizer = LoraOptimizer(model, dict(load_model(base).named_parameters()), Lora(2), AdamW(), 0)
    other = LoraOptimizer(load_model(base), dict(load_model(base).named_parameters()), Lora(3), AdamW(), 0)
    with pytest.raises(CheckpointError, match="does not fit this adapter"):
        optimizer.load_state_tensors(other.state_tensors())


@pytest.mark.parametrize("changes, complaint", [
    (dict(demonstrations=None), "nothing to learn"), (dict(tune="lora", minutes=1.0), "minutes are measured"),
    (dict(tune="experts", parallel=Parallel(2)), "tune 'experts' is for one process"),
])
def test_recipes_that_cannot_work_are_refused(base, tmp_path, changes, complaint):
    with pytest.raises(RecipeError, match=complaint):
        recipe(base, tmp_path / "run", **changes)
    with pytest.raises(RecipeError, match="efforts"):
        Demonstrations(("letters",), efforts=("low",))
    with pytest.raises(RecipeError, match="careless is 1.5"):
        Demonstrations(("letters",), careless=1.5)
