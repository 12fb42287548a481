"""The lab's experiments at the smallest size: every variant trains, is measured and judged; swaps swap and are undone; pages are whole."""

import dataclasses
import json
import math
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fathom import ops
from fathom.accounting import parameters
from fathom.config import ModelConfig
from fathom.data.packing import PackedData
from fathom.data.transforms import pack_examples
from fathom.errors import FathomError, InputError
from fathom.lab import claims, claims_page
from fathom.lab.experiment import Verdict, lower, noise, swapped, worst
from fathom.lab.experiments import EXPERIMENTS, attention, compression, early_layers, indexer, mtp, overlap, sample_masks, scoring, streams
from fathom.lab.one_run import one_run
from fathom.model.hyper_connections import HyperConnection
from fathom.model.transformer import Transformer
from fathom.recipe import load
from fathom.train.pretrain import Pretrain
from fathom.train.watch import Watch
from tests.models import random_model, random_tokens, small_config
from tests.runs import command, environment, fathom, micro_recipe

ROOT = Path(__file__).parents[2]
OUTCOMES = {"reproduced", "partly", "not"}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A recipe like recipes/lab.toml, of two steps on a page of text; the model has its layers, a tenth of its width."""
    folder = tmp_path_factory.mktemp("lab")
    recipe = micro_recipe(folder, steps=2, batch_tokens=1024, lengths=[512], warmup_steps=1, decay_steps=1)
    values = json.loads((ROOT / "recipes/models/lab.json").read_text())
    values |= {"vocab_size": 320, "hidden_size": 32, "q_lora_rank": 16, "o_lora_rank": 16, "moe_intermediate_size": 16, "index_n_heads": 2,
               "num_attention_heads": 2, "hc_sinkhorn_iters": 3}
    (folder / "model.json").write_text(json.dumps(values))
    text = recipe.read_text().replace("validation_tokens = 256", "validation_tokens = 1024")
    recipe.write_text(text.replace("piece_bytes = 500", "piece_bytes = 4000"))
    return recipe


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_variant_trains_and_is_measured_and_the_rule_gives_a_verdict(name, base, tmp_path):
    experiment = EXPERIMENTS[name]
    numbers = {}
    for variant in experiment.variants:
        overrides = ["data.validation_tokens=1024"]
        result = one_run(experiment, variant, 0, tmp_path / name / variant.name.replace(" ", "-"), base, overrides)
        numbers[variant.name] = [result["numbers"]]
        assert all(math.isfinite(value) for value in result["numbers"].values())
        assert experiment.metric in result["numbers"] and result["curve"][-1][0] == 2
    verdict = experiment.judge(numbers)
    assert verdict.outcome in OUTCOMES and verdict.ours
    assert experiment.claim.endswith(".") and experiment.rule.endswith(".") and experiment.source


def test_attentions_are_compared_at_equal_parameters():
    found = attention.equalised(ROOT / "recipes/models/lab.json")
    assert {name: changes["moe_intermediate_size"] for name, changes in found.items()} == attention.WIDTHS
    values = json.loads((ROOT / "recipes/models/lab.json").read_text())
    totals = [parameters(ModelConfig.from_dict(values | changes)).total for changes in found.values()]
    assert max(totals) / min(totals) < 1.01


def test_the_shipped_recipe_is_the_variants_base():
    recipe = load(Pretrain, ROOT / "recipes/lab.toml")
    config = ModelConfig.load(ROOT / "recipes" / recipe.model)
    assert parameters(config).total < 2e6
    for experiment in EXPERIMENTS.values():
        for variant in experiment.variants:
            load(Pretrain, ROOT / "recipes/lab.toml", variant.set)
            ModelConfig.from_dict(config.to_dict() | variant.model)


# ---- verdicts

def numbers(**values):
    return {name: [{"bits": value} for value in each] for name, each in values.items()}


@pytest.mark.parametrize(("good", "bad", "outcome"), [
    ([1.0, 1.01, 0.99], [1.5, 1.51, 1.49], "reproduced"), ([1.0, 1.2, 0.8], [1.02, 1.2, 0.86], "partly"), ([1.5], [1.0], "not"),
    ([1.0], [1.004], "partly"), ([1.0], [1.006], "reproduced")])
def test_lower_is_judged_against_the_noise(good, bad, outcome):
    assert lower(numbers(a=good, b=bad), "a", "b").outcome == outcome


def test_noise_is_two_standard_errors_and_verdicts_combine():
    assert noise(numbers(a=[1.0, 3.0], b=[2.0, 2.0]), ("a", "b")) == pytest.approx(2 * math.sqrt(2 / 2))
    good, bad = Verdict("reproduced", "x"), Verdict("not", "y")
    assert [worst(good, good).outcome, worst(good, bad), worst(bad, bad).outcome] == ["reproduced", ("partly", "x; y"), "not"]


# ---- swaps

def test_a_swap_is_undone_even_after_an_error():
    before = ops.pool_blocks
    with pytest.raises(ZeroDivisionError), swapped((ops, "pool_blocks", compression.mean_pooling)):
        assert ops.pool_blocks is compression.mean_pooling
        1 / 0
    assert ops.pool_blocks is before


def test_mean_pooling_is_the_mean_and_disjoint_blocks_see_only_themselves():
    value, score = torch.randn(1, 12, 6), torch.randn(1, 12, 6)
    current, previous = torch.arange(12).view(3, 4), torch.tensor([[0] * 4, [0, 1, 2, 3], [4, 5, 6, 7]])
    has = torch.tensor([False, True, True])
    plain = compression.mean_pooling(value, score, current, None, None)
    torch.testing.assert_close(plain, value[0].view(3, 4, 6).mean(1))
    alone = overlap.alone(value, score, current, previous, has)
    changed = value.clone()
    changed[0, :8] = 0  # the first two blocks
    torch.testing.assert_close(overlap.alone(changed, score, current, previous, has)[2], alone[2])
    assert not torch.allclose(ops.pool_blocks(changed, score, current, previous, has)[2], ops.pool_blocks(value, score, current, previous, has)[2])


@torch.no_grad()
def test_unconstrained_streams_start_as_the_identity_and_then_amplify():
    connection = Transformer(small_config([0])).initialise(0).blocks[0].attention_streams
    X = torch.randn(1, 3, 4, 64)
    with swapped((ops, "open_streams", streams.unconstrained)):
        res = connection.open(X)[2]
        assert (res - torch.eye(4)).abs().max() < 0.01
        connection.scale.fill_(5.0)
        connection.fn.normal_(0, 1)
        wild = connection.open(X)[2]
    assert wild.abs().sum(-1).max() > 2
    assert connection.open(X)[2].sum(-1).max() < 1.1  # with the constraint
    assert HyperConnection.open.__qualname__ == "HyperConnection.open"


@torch.no_grad()
def test_the_oracle_reads_what_is_read_most_and_random_only_what_is_visible():
    model, tokens = random_model(small_config([4], index_topk=8)).double(), random_tokens(small_config([4]), 1, 200)
    plain = model(tokens).logits
    seen = []

    def noted(*arguments):
        seen.append(indexer.random_topk(*arguments))
        return seen[-1]

    with swapped((ops, "attention", indexer.oracle)):
        best = model(tokens).logits
    with swapped((ops, "index_topk", noted)):
        model(tokens)
    with swapped((ops, "index_topk", indexer.no_entries)):
        nothing = model(tokens).logits
    assert not torch.equal(best, plain) and not torch.equal(nothing, plain)
    torch.testing.assert_close(best[:, :32], plain[:, :32])  # all visible entries are read there
    chosen, visible = seen[0][0], (torch.arange(200) + 1) // 4
    assert (chosen < visible[:, None]).all() and ((chosen >= 0).sum(1) == visible.clamp(max=8)).all()
    assert not torch.equal(chosen[100], chosen[-1])


def test_routers_and_dense_layers_take_their_place():
    config = small_config([0, 0], num_hash_layers=1)
    scoring_variant, dense = EXPERIMENTS["scoring"].variants[1], EXPERIMENTS["early-layers"].variants[2]
    with scoring_variant.swap():
        assert all(type(block.moe.router) is scoring.SigmoidRouter for block in Transformer(config).blocks)
    with dense.swap():
        model = Transformer(config)
    assert [type(block.moe) is early_layers.DenseFeedForward for block in model.blocks] == [True, False]
    width = model.blocks[0].moe.shared.up.weight.shape[0]
    assert width == (config.num_experts_per_tok + 1) * config.moe_intermediate_size
    watch = Watch(model.initialise(0), 1)
    with watch.forward(1):  # as a training run looks at its model
        model(random_tokens(config, 1, 20))
    assert len(watch._found["router_entropy"]) == 1 and len(watch._found["stream_rms"]) == 2


def test_rows_without_masks_are_one_document():
    packed = pack_examples([([1, 2, 3], [True] * 3), ([4, 5], [True] * 2)], 8, 0, 0)
    assert isinstance(packed, PackedData)
    unmasked = sample_masks.OneDocument(packed.store, 8, 0, 0)
    assert unmasked.rows(0, 1).positions_BS.tolist() == [[*range(8)]]
    assert torch.equal(unmasked.rows(0, 1).targets_BS, PackedData(packed.store, 8, 0, 0).rows(0, 1).targets_BS)


# ---- the command

@pytest.fixture(scope="module")
def runs(base, tmp_path_factory) -> Path:
    """Results of one experiment with one seed, by processes."""
    out, patch = tmp_path_factory.mktemp("runs"), pytest.MonkeyPatch()
    patch.setattr(claims, "EXPERIMENTS", {"compression": dataclasses.replace(compression.EXPERIMENT, seeds=(0,))})
    patch.setenv("OMP_NUM_THREADS", "1")
    claims.run_experiments("compression", out, base, [], 2, Console(quiet=True))
    patch.undo()
    return out


def test_finished_runs_are_kept_and_never_mixed_with_another_recipes(runs, base, monkeypatch):
    monkeypatch.setattr(claims, "EXPERIMENTS", {"compression": dataclasses.replace(compression.EXPERIMENT, seeds=(0,))})
    monkeypatch.setattr(claims, "_start", None)  # nothing may start
    again = claims.run_experiments("compression", runs, base, [], 1, Console(quiet=True))
    kept = json.loads((runs / "compression.json").read_text())
    assert again == [kept] and kept["verdict"] in OUTCOMES and kept["command"] == "fathom lab run compression"
    assert kept["numbers"].keys() == kept["curves"].keys() == {"learned", "mean"}
    with pytest.raises(InputError, match="holds a run with other --set"):
        claims.run_experiments("compression", runs, base, ["seed=7"], 1, Console(quiet=True))


def test_what_several_experiments_compare_with_is_trained_once(base, tmp_path, monkeypatch):
    experiments = {each.name: dataclasses.replace(each, seeds=(0,), variants=each.variants[:1]) for each in (compression.EXPERIMENT, mtp.EXPERIMENT)}
    monkeypatch.setattr(claims, "EXPERIMENTS", experiments)
    monkeypatch.setattr(claims, "judge", lambda experiment, *_: {"name": experiment.name, "verdict": "", "ours": ""})
    claims.run_experiments("all", tmp_path, base, [], 2, Console(quiet=True))
    steps = [json.loads(line)["step"] for line in (tmp_path / "base/0/run/metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert steps == [1, 2] and not [*tmp_path.glob("*/*-0/run")]
    numbers = [json.loads((tmp_path / name / "result.json").read_text())["numbers"] for name in ("compression/learned-0", "mtp/MTP-0")]
    assert numbers[0]["bits"] == numbers[1]["bits"] and "accepted" not in numbers[0] and len(numbers[1]) > len(numbers[0])


def test_a_run_that_fails_is_named_with_its_last_words(base, tmp_path, monkeypatch):
    monkeypatch.setattr(claims, "EXPERIMENTS", {"compression": dataclasses.replace(
        compression.EXPERIMENT, seeds=(0,), variants=compression.EXPERIMENT.variants[:1])})
    with pytest.raises(FathomError, match="1 runs failed, first compression: learned, seed 0: .*no-such-folder"):
        claims.run_experiments("compression", tmp_path, base, ['data.sources=["no-such-folder"]'], 1, Console(quiet=True))


@pytest.mark.parametrize("gaps, indexer_above_oracle, caught, outcome", [
    ((0.10, 0.11, 0.12), 0.02, 0.5, "reproduced"), ((0.10, 0.11, 0.12), 0.08, 0.5, "partly"), ((0.10, 0.11, 0.12), 0.11, 0.99, "not"),
    ((0.001, 0.0, -0.001), 0.0, 0.95, "partly"), ((0.001, 0.0, -0.001), 0.0, 0.8, "not"), ((-0.1, -0.1, -0.1), 0.0, 0.8, "not")])
def test_the_indexer_is_judged_by_bits_only_where_they_tell_choices_apart(gaps, indexer_above_oracle, caught, outcome):
    runs = [{"bits_oracle": 1.0, "bits_indexer": 1.0 + indexer_above_oracle, "bits_random": 1.0 + gap, "bits_nothing": 2.0, "mass_caught": caught}
            for gap in gaps]
    verdict = indexer.EXPERIMENT.judge({"trained": runs})
    assert verdict.outcome == outcome and ("too little difference" in verdict.ours) == (min(gaps) <= 0)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_command_stops_its_runs_which_go_on_later(base, tmp_path, sent):
    arguments = "lab", "run", "compression", "--recipe", base, "--out", tmp_path, "--jobs", 1, "--set", "schedule.steps=100000"
    process = subprocess.Popen(command(*arguments), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    run = tmp_path / "base/0/run"
    deadline = time.monotonic() + 300
    while not (run / "checkpoints").is_dir() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    os.kill(process.pid, sent)
    process.communicate(timeout=300)
    saved = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert process.returncode == 130 and saved
    checkpoint = max(int(folder.name.removeprefix("step-")) for folder in (run / "checkpoints").glob("step-*"))
    assert checkpoint == saved[-1]  # the step it was at was saved


def test_pages_hold_every_claim_once_with_verdict_plot_and_command(runs, tmp_path):
    counts = claims_page.write_report(runs, tmp_path, Console(quiet=True))
    page, text = (tmp_path / "index.html").read_text(), (tmp_path / "README.md").read_text()
    assert counts["too big for here"] == len(claims_page.TOO_BIG) and sum(counts.values()) == 1 + 22 + len(claims_page.TOO_BIG)
    for name in (page, text):
        assert name.count(compression.EXPERIMENT.claim) == 1 and "fathom lab run compression" in name
        assert all(other in name for other in EXPERIMENTS if other != "compression")  # not run yet
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert (tmp_path / "compression.json").read_text() == (runs / "compression.json").read_text()
    assert (tmp_path / "compression.svg").read_text().count("<circle") == 2


def test_the_command_line_lists_and_refuses():
    listed = fathom("lab", "run", "list", timeout=300)
    assert listed.returncode == 0 and all(name in listed.stdout for name in EXPERIMENTS)
    for arguments in (("run", "mouon"), ("run", "muon", "--jobs", 0), ("report", "--runs", "no-such-folder")):
        wrong = fathom("lab", *arguments, timeout=300, cwd=ROOT)
        assert wrong.returncode == 2 and "Traceback" not in wrong.stderr, arguments
