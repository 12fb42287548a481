"""`fathom bench` at the smallest size: what it reports, what it refuses, and what happens when a measurement dies."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from fathom.accounting import parameters
from fathom.config import ModelConfig
from fathom.lab.bench import peer_transformers
from fathom.lab.bench.child import Fathom
from fathom.lab.bench.measure import measure
from fathom.lab.bench.plan import BENCH_S, BenchError, Case, Plan
from fathom.lab.bench.run import Failure, run_child
from fathom.lab.bench.shares import add_ratios, arithmetic, decode_bytes, figures, mean_flops
from tests.models import small_config
from tests.runs import command, environment, fathom

CEILINGS = {"float32": {"torch": {"a": 25.0, "b": 50.0}, "onednn": {"a": 100.0, "b": 20.0}}, "bfloat16": {"torch": {"a": 200.0}},
            "read": 10.0}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A config.json of about 100k parameters."""
    path = tmp_path_factory.mktemp("bench") / "small.json"
    path.write_text(small_config([0, 4, 128]).to_json())
    return path


def rows(path: Path) -> list[dict]:
    return json.loads(path.read_text())["rows"]


@pytest.mark.parametrize("verb", ["prefill", "decode", "train", "all"])
def test_every_bench_explains_itself_with_an_example(verb):
    result = fathom("bench", verb, "--help")
    assert result.returncode == 0 and f"fathom bench {verb} " in result.stdout and "Example:" in result.stdout


def test_bench_s_is_the_documented_model():
    assert round(parameters(BENCH_S).total / 1e6) == 121 and BENCH_S.max_position_embeddings >= 131072


def test_prefill_beside_transformers_is_measured_and_reported(model, tmp_path):
    out = tmp_path / "new" / "prefill.json"
    result = subprocess.run(  # with nothing on the path there is no C++ compiler, and the peer runs as it is
        command("bench", "prefill", "--model", model, "--lengths", "128", "--chunk", "48", "--repeats", "1", "--seed", "3",
                "--threads", "1", "--against", "transformers", "--peer-dtype", "bfloat16", "--out", out),
        capture_output=True, text=True, env=environment() | {"PATH": ""})
    assert result.returncode == 0, result.stderr
    report = json.loads(out.read_text())
    assert report["command"][:3] == ["fathom", "bench", "prefill"] and not report["interrupted"]
    assert report["machine"]["cores"] >= 1 and report["ceilings"]["threads"] == 1 and report["ceilings"]["read"] > 0
    assert report["ceilings"]["kernels"] is False and "no kernels in C" in " ".join(result.stdout.split())
    assert ModelConfig.from_dict(report["config"]) == ModelConfig.load(model)
    found = report["rows"]
    assert [(row["length"], row["program"], row["dtype"], row["chunk"]) for row in found] == [
        (128, "fathom", "float32", 48), (128, "transformers", "bfloat16", 512)]
    for row in found:
        assert "failed" not in row, row
        assert row["tokens_per_second"]["median"] > 0 and len(row["seconds"]) == 1 and 0 < row["share_of_matmul"] < 1
        assert row["extra_bytes"] >= 0 and row["peak_bytes"] > 5e7 and row["threads"] == 1
    assert found[1]["compiled"] is False and found[1]["version"]
    speeds = [row["tokens_per_second"]["median"] for row in found]
    assert found[0]["ratio"]["transformers"] == pytest.approx(speeds[0] / speeds[1])
    assert not out.with_suffix(".png").exists()  # one length is no line
    assert "prefill 128" in result.stdout and "transformers bf16" in result.stdout and "GFLOP/s" in result.stdout


def test_decode_measures_rows_alone_and_a_batch_and_draws_its_curve(model, tmp_path):
    out = tmp_path / "decode.json"
    result = fathom("bench", "decode", "--model", model, "--lengths", "64,96", "--batch", "3", "--repeats", "1",
                    "--dtype", "bfloat16", "--out", out)
    assert result.returncode == 0, result.stderr
    assert [(row["length"], row["batch"]) for row in rows(out)] == [(64, 1), (96, 1), (64, 3)]
    for row in rows(out):
        assert row["ms_per_step"]["median"] == pytest.approx(1e3 * row["batch"] / row["tokens_per_second"]["median"])
        assert 0 < row["share_of_bandwidth"] < 1
    assert "decode 64 x3" in result.stdout and out.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"


def test_train_measures_whole_steps_with_mtp(model, tmp_path):
    out = tmp_path / "train.json"
    result = fathom("bench", "train", "--model", model, "--tokens", "64", "--mtp", "0.3", "--repeats", "2", "--out", out)
    assert result.returncode == 0, result.stderr
    (row,) = rows(out)
    assert row["mtp"] == 0.3 and len(row["seconds"]) == 2 and row["share_of_matmul"] > 0 and row["extra_bytes"] > 0


def test_bfloat16_is_measured_in_bfloat16(model):
    ours = Fathom(Plan(str(model), "bfloat16").prefill("64")[0])
    tensors = {name: tensor.dtype for name, tensor in ours.model.named_parameters()}
    assert tensors["head.weight"] is tensors["blocks.0.moe.experts.gate"] is torch.bfloat16
    assert tensors["blocks.0.attention.sink"] is tensors["blocks.0.attention_streams.fn"] is torch.float32


def test_train_in_mixed_precision_with_the_peers_optimiser(model, tmp_path):
    out = tmp_path / "train.json"
    result = fathom("bench", "train", "--model", model, "--tokens", "64", "--repeats", "1", "--dtype", "bfloat16", "--optimizer", "adamw", "--out", out)
    assert result.returncode == 0, result.stderr
    (row,) = rows(out)
    assert row["optimizer"] == "adamw" and row["dtype"] == "bfloat16" and row["tokens_per_second"]["median"] > 0
    ours = Fathom(Plan(str(model), "bfloat16").train("64", optimizer="adamw")[0])
    ours.train(torch.zeros(1, 64, dtype=torch.int64))
    assert {p.dtype for p in ours.model.parameters()} == {torch.float32} and not ours.optimizer.muon.state and ours.products == torch.bfloat16


def test_a_peer_trains_and_decodes(model, monkeypatch):
    monkeypatch.setattr(peer_transformers, "can_compile", lambda: False)
    plan = Plan(str(model), repeats=1, against="transformers")
    for case in (*plan.train("64"), *plan.decode("64", 2)):
        if case.program == "transformers":
            outcome = measure(case, peer_transformers.Transformers)
            assert len(outcome["seconds"]) == 1 and outcome["experts"] in ("grouped_mm", "batched_mm")


@pytest.mark.parametrize(("arguments", "words"), [
    (["prefill", "--dtype", "float8"], "dtype is 'float8'; allowed: float32, bfloat16"),
    (["prefill", "--lengths", "64,0"], "lengths has 0; allowed: at least 1"),
    (["prefill", "--lengths", "64;128"], "lengths is '64;128'"),
    (["prefill", "--lengths", "5000"], "max_position_embeddings is 4096"),
    (["decode", "--lengths", "4096"], "tokens follow"),
    (["prefill", "--chunk", "0"], "chunk is 0"),
    (["prefill", "--model", "no-such-model"], "allowed: bench-s, tiny, nano"),
    (["prefill", "--repeats", "0"], "repeats is 0"),
    (["decode", "--batch", "0"], "batch is 0"),
    (["train", "--mtp", "-1"], "mtp is -1.0"),
    (["train", "--optimizer", "sgd"], "optimizer is 'sgd'; allowed: muon, adamw"),
    (["train", "--threads", "0"], "threads is 0"),
    (["decode", "--lengths", "64", "--device", "abacus"], "device is 'abacus'; here are: cpu"),
    (["prefill", "--against", "llama"], "unknown peer 'llama'; allowed: transformers"),
    (["prefill", "--lengths", "64", "--out", "."], "cannot write ."),
])
def test_wrong_input_is_one_line_and_exit_code_2(model, arguments, words):
    chosen = [] if "--model" in arguments else ["--model", model]
    result = fathom("bench", arguments[0], *chosen, *arguments[1:])
    assert result.returncode == 2 and result.stdout == ""
    assert words in result.stderr and result.stderr.startswith("fathom: ") and result.stderr.count("\n") == 1


def test_a_peer_must_be_installed_and_have_the_layers(model, tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BenchError, match="transformers is not installed"):
        Plan(against="transformers")
    monkeypatch.undo()
    other = tmp_path / "other.json"
    other.write_text(small_config([0, 8]).to_json())
    with pytest.raises(BenchError, match="no compression ratio 8"):
        Plan(str(other), against="transformers")


def test_a_killed_measurement_is_a_row_and_ctrl_c_keeps_what_there_is(model, tmp_path):
    out = tmp_path / "prefill.json"
    process = subprocess.Popen(
        command("bench", "prefill", "--model", model, "--lengths", "64,128", "--repeats", "1000000", "--out", out),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        os.kill(_measuring(process.pid, after=0), signal.SIGKILL)  # what the system does where memory runs out
        second = _measuring(process.pid, after=1, out=out)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130 and "Traceback" not in errors
    assert "died (signal 9)" in output and "interrupted: 1 of 2 cases measured" in output
    assert [(row["length"], row["failed"]) for row in rows(out)] == [(64, "died (signal 9)")]
    assert json.loads(out.read_text())["interrupted"] and not Path(f"/proc/{second}").exists()


def _measuring(parent: int, after: int, out: Path | None = None) -> int:
    """The process id of the running case, once `after` cases are kept in `out`."""
    for _ in range(6000):
        time.sleep(0.05)
        if out and (not out.exists() or len(rows(out)) < after):
            continue
        for child in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
            if b"fathom.lab.bench.child" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
    raise AssertionError("no case started")


def test_a_measurement_that_fails_says_why_in_one_line():
    with pytest.raises(Failure, match="^failed: .*'no JSON'|^failed: .*JSONDecodeError"):
        run_child("fathom.lab.bench.ceilings", "no JSON")


def test_a_case_survives_the_way_to_its_process():
    for case in Plan(repeats=2, seed=4).decode("512,8192", 8) + Plan(dtype="bfloat16").train("64", 0.3):
        assert Case.from_json(case.to_json()) == case


def test_shares_by_hand():
    config = ModelConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, head_dim=4, qk_rope_head_dim=2, q_lora_rank=2,
        o_groups=1, o_lora_rank=2, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=3, compress_ratios=(0, 4, 128),
        index_n_heads=2, index_head_dim=4, index_topk=3, sliding_window=16, num_nextn_predict_layers=0)
    weights, head = 2 * parameters(config).activated, 2 * 10 * 8
    # contexts 1, 3, ... 127: the window is full from 16 on, CSA has three entries from 12 on, HCA none below 128
    window = (sum(range(1, 16, 2)) + 56 * 16) / 64
    entries = (2 * 0 + 2 * 1 + 2 * 2 + 58 * 3) / 64
    index = sum(context // 4 for context in range(1, 128, 2)) / 64
    forward = weights + 4 * (3 * window + entries) * 2 * 4 + 2 * index * 2 * 4
    assert mean_flops(config, 128) == pytest.approx(forward)
    prefill = Case("prefill", "fathom", config, 128, 1, "float32", 3)
    assert arithmetic(prefill) == pytest.approx(forward - head)
    train = Case("train", "fathom", config, 128, 1, "float32", 3)
    assert arithmetic(train) == pytest.approx(3 * forward)

    outcome = {"seconds": [1.0, 4.0, 2.0], "bytes_before": 100, "bytes_peak": 150, "threads": 2}
    row = figures(prefill, outcome, CEILINGS)
    assert row["tokens_per_second"] == {"median": 64, "least": 32, "most": 128} and row["extra_bytes"] == 50 and row["threads"] == 2
    assert row["share_of_matmul"] == pytest.approx((forward - head) * 64 / 100e9)
    assert row["share_of_torch_matmul"] == pytest.approx(2 * row["share_of_matmul"])
    assert "share_of_matmul" not in figures(prefill, outcome, None)

    # one row after 256 tokens: 16 window keys in each layer, 3 of 64 CSA entries and 64 index keys, 2 HCA entries
    cache = (3 * 16 + 3 + 2) * 4 + 64 * 4
    assert decode_bytes(config, 256, 1, 2) == 2 * (parameters(config).activated + cache)
    # two rows choose 2 of 4 experts each: 3 distinct ones are expected in a layer
    assert decode_bytes(config, 256, 2, 2) == 2 * (parameters(config).activated + 3 * (3 * 8 * 3) + 2 * cache)
    decode = figures(Case("decode", "fathom", config, 256, 2, "bfloat16", 3, steps=10), outcome, CEILINGS)
    assert decode["tokens_per_second"]["median"] == 10 and decode["ms_per_step"] == {"median": 200, "least": 100, "most": 400}
    assert decode["share_of_bandwidth"] == pytest.approx(decode["bytes_per_step"] / 0.2 / 10e9)


def test_mtp_blocks_count_as_layers_with_a_head():
    plan = Plan()
    without, with_mtp = plan.train("2048")[0], plan.train("2048", 0.3)[0]
    assert without.config.num_nextn_predict_layers == 0 and with_mtp.config.num_nextn_predict_layers == 1
    block = arithmetic(with_mtp) / 3 - arithmetic(without) / 3
    window_layer = 2 * (BENCH_S.head_dim * 8) * 2 * 128  # scores and values of a full window
    idle = 28 * 3 * BENCH_S.hidden_size * BENCH_S.moe_intermediate_size  # experts that a token does not take
    norms = 3 * BENCH_S.hidden_size + 16 * BENCH_S.hidden_size + 5  # MTP parameters that multiply no token here
    assert block == pytest.approx(2 * (parameters(BENCH_S).mtp - idle - norms) + window_layer + 2 * 8192 * 512, rel=0.02)


def test_ratios_compare_the_same_case_only():
    def row(program, length, speed):
        return {"program": program, "kind": "prefill", "length": length, "batch": 1, "tokens_per_second": {"median": speed}}

    found = [row("fathom", 64, 30.0), row("transformers", 64, 10.0), row("fathom", 128, 5.0),
             {"program": "transformers", "kind": "prefill", "length": 128, "batch": 1, "failed": "died (signal 9)"}]
    add_ratios(found)
    assert found[0]["ratio"] == {"transformers": 3.0} and not any("ratio" in each for each in found[1:])
