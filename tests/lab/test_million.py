"""A long text in small: figures are those of what is there, reading is left undisturbed, facts arrive through compressed entries."""

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from fathom.accounting import cache_bytes, flops_per_token, parameters
from fathom.checkpoint.released import save_model
from fathom.config import ModelConfig
from fathom.errors import FathomError
from fathom.lab.baseline_costs import curves, rivals
from fathom.lab.million import Settings, read_text, run_million, small_config
from fathom.lab.million_facts import observe, plant, read_with, window_only
from fathom.lab.million_reader import Reader
from fathom.lab.million_report import SpeedTrace
from fathom.lab.million_run import ROOM, decode
from fathom.text.tokenizer import Tokenizer
from tests.models import random_model, random_tokens
from tests.models import small_config as micro_config
from tests.runs import command, environment, fathom

WORDS = "the sea was calm and the captain walked along the deck while a light wind filled every sail ".split()
FACT = torch.tensor([7, 8, 9, 10])


@pytest.fixture(scope="module")
def pages(tmp_path_factory) -> Path:
    """A folder of 5 texts, about 1,500 tokens."""
    folder = tmp_path_factory.mktemp("pages")
    for number in range(5):
        words = [WORDS[(number * 7 + i * i) % len(WORDS)] for i in range(300)]
        (folder / f"page{number}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The command's result, its printed text, and the file."""
    out = tmp_path_factory.mktemp("million") / "million.json"
    result = fathom("bench", "million", "--tokens", "4096", "--chunk", "512", "--fact-tokens", "1024", "--full-facts", "--out", out)
    assert result.returncode == 0, result.stderr
    return json.loads(out.read_text()), result.stdout, out


def test_every_mark_says_what_it_cost(run):
    result, printed, out = run
    assert result["complete"] and [mark["tokens"] for mark in result["marks"]] == [1024, 4096]
    for mark in result["marks"]:
        assert min(mark["seconds"], mark["tokens_per_second"], mark["decode_ms"]) > 0
        assert mark["peak_memory"] > result["memory_before"] > 50e6
    assert result["marks"][0]["seconds"] < result["marks"][1]["seconds"]
    assert [tokens for tokens, _ in result["speed"]] == [409, 921, 1024, 1536, 2048, 2560, 3072, 3584, 4096]
    assert "austen.jsonl.xz" in printed and "random weights, seed 0" in printed and "1,024 tokens" in printed
    assert out.with_suffix(".png").stat().st_size > 10_000


def test_cache_bytes_are_those_of_the_tensors(run):
    result, _, _ = run
    used = cache_bytes(ModelConfig.from_dict(result["config"]))
    windows, tails = 6 * 128 * 64 * 4, 2 * 8 * 4 * 96 * 4 + 2 * 128 * 2 * 64 * 4
    entries = 2 * (4480 // 4) * 96 * 4 + 2 * (4480 // 128) * 64 * 4  # 4,096 tokens, 18 decoded, up to a whole block, and two more for recorded steps
    assert result["cache_tokens"] == 4480 and result["cache_nbytes"] == windows + tails + entries == used.at(4480)
    assert [mark["cache_bytes"] for mark in result["marks"]] == [used.at(1024), used.at(4096)]


def test_facts_at_every_depth_arrive_and_the_control_stays_equal_to_the_bit(run):
    facts = run[0]["facts"]
    assert [(fact["context"], round(fact["depth"], 1)) for fact in facts] == [
        *((1024, depth) for depth in (0.1, 0.3, 0.5, 0.7, 0.9)), (4096, 0.1)]
    assert all(fact["difference"] > 1e-3 and fact["kl"] > 0 for fact in facts)
    assert facts[0]["beyond_windows"] and facts[0]["control"] == 0 and facts[5]["control"] is None
    assert facts[4]["control"] > 0  # within the windows
    for fact in facts:
        assert list(fact["selected"]) == ["2", "4"]
        assert all(fact["tokens"] // 4 <= of <= fact["tokens"] // 4 + 3 for of in fact["entries"].values())
        assert all(0 <= fact["selected"][layer] <= of for layer, of in fact["entries"].items())


def test_baseline_costs_by_hand():
    # Per layer: experts 3 x 98,304, router 4,096 (and 16 where learned), norms 512, streams 49,206; head and collapse 528,645.
    rest = 6 * (294_912 + 4_096 + 512 + 49_206) + 5 * 16 + 528_645
    config = small_config()
    v4, gqa, mla, dsa = rivals(config).values()
    latent = rest + 6 * (32_768 + 128 + 49_152 + 73_728 + 256 + 131_072 + 65_536)
    assert parameters(gqa).activated == rest + 6 * (262_144 + 128)
    assert parameters(mla).activated == latent
    assert parameters(dsa).activated == latent + 6 * (25_600 + 64)
    weights = rest + 6 * 131_268 + 2 * (66_112 + 17_408 + 33_056) + 2 * 41_024  # window, CSA and its indexer, HCA
    read, index = 2 * 128 + 2 * (128 + 128) + 2 * (128 + 32), 2 * 2 * 1024 * 4 * 32  # keys in all layers, indexers
    assert 2 * weights + 4 * 256 * read + index == 9_086_178
    assert curves(config, [4096]) == {
        "V4": {"flops": [9_086_178], "cache_bytes": [1_155_072]},
        "GQA, 4 KV heads": {"flops": [33_555_250], "cache_bytes": [50_331_648]},
        "MLA, latent 256 + 32": {"flops": [116_428_594], "cache_bytes": [28_311_552]},
        "DSA, top 2,048": {"flops": [69_550_642], "cache_bytes": [31_457_280]}}
    few = flops_per_token(dsa, 1024)  # fewer than the top
    assert few["attention"] + few["indexer"] == 1024 * (6 * 4 * 1088 + 6 * 256)


@pytest.fixture(scope="module")
def model():
    return random_model(micro_config([0, 4, 128, 4], sliding_window=16, num_nextn_predict_layers=0, compress_ratios=[0, 4, 128, 4]))


@torch.inference_mode()
def test_decoding_at_a_mark_leaves_the_reading_undisturbed(model):
    token_T = random_tokens(model.config, 600)
    quiet, disturbed = (Reader(model, token_T, 100, [130, 401], room=ROOM) for _ in range(2))
    for begin, end in disturbed.chunks():
        logits_V = disturbed.read_chunk(begin, end)
        ids = decode(disturbed, logits_V, 100)[1]
        assert len(ids) == ROOM and max(ids) < 100
    assert torch.equal(logits_V, quiet.read())
    assert [tokens for _, tokens in quiet.chunks()] == [100, 130, 230, 330, 401, 501, 600]


@torch.inference_mode()
def test_going_back_gives_what_reading_everything_again_gives(model):
    token_T = random_tokens(model.config, 600)
    reader = Reader(model, token_T, 128, keep=[70, 333])
    plain_V = reader.read()
    for place in (333, 70):
        changed_T = token_T.clone()
        changed_T[place:place + 4] = FACT
        again_V = Reader(model, changed_T, 128, keep=[70, 333]).read()
        assert torch.equal(read_with(FACT, reader, place), again_V) and not torch.equal(again_V, plain_V)
    reader.back_to(70)
    assert torch.equal(reader.read(70), plain_V)


@torch.inference_mode()
def test_without_compressed_entries_a_far_fact_changes_nothing(model):
    reader = Reader(window_only(model), random_tokens(model.config, 300), 64, keep=[232, 280])
    plain_V = reader.read()
    assert not torch.equal(read_with(FACT, reader, 280), plain_V)
    assert torch.equal(read_with(FACT, reader, 232), plain_V)  # the last token of the fact is 64 back, 4 windows reach 60
    facts = {fact.place: fact for fact in plant(model, reader.token_T, FACT, 64, [0.1, 0.78, 0.97])}
    assert [(fact.beyond_windows, fact.control == 0) for _, fact in sorted(facts.items())] == [(True,) * 2] * 2 + [(False,) * 2]
    assert all(fact.difference > 0 for fact in facts.values())


@torch.inference_mode()
def test_chosen_entries_are_counted(model):
    token_T = random_tokens(model.config, 80)
    everything = Reader(model, token_T, 16, keep=[16])
    logits_V = everything.read()
    fact = observe(everything, logits_V, 16, random_tokens(model.config, 60, seed=1))
    assert fact.entries == {1: 16, 3: 16} and all(8 <= count <= 12 for count in fact.selected.values())  # 12 of 20 are read
    short = Reader(model, token_T[:40], 16, keep=[16])
    few = observe(short, short.read(), 16, FACT)
    assert few.selected == few.entries == {1: 2, 3: 2}  # all 10 entries are read


def test_text_is_repeated_in_a_seeded_order_and_ends_with_the_query(pages):
    settings = Settings(tokens=4096, text=str(pages), fact_tokens=0)
    text, tokenizer = read_text(settings, None)
    again, other = (read_text(Settings(tokens=4096, text=str(pages), seed=seed), tokenizer)[0] for seed in (0, 1))
    assert len(text.tokens) == 4096 and text.documents == 5 and text.once < 4096 - 100
    assert (text.tokens == again.tokens).all() and (text.tokens != other.tokens).any()
    first = tokenizer.decode(text.tokens[:text.once].tolist(), skip_special=True)
    assert first == "".join(page.read_text() for page in sorted(pages.iterdir()))
    assert tokenizer.decode(text.tokens[-40:].tolist()).endswith(" The number to remember is")


@pytest.fixture(scope="module")
def folder(pages, model, tmp_path_factory) -> Path:
    """A saved model with its tokenizer, for 4,096 tokens."""
    path = tmp_path_factory.mktemp("model") / "model"
    save_model(model, path)
    Tokenizer.train((page.read_text() for page in pages.iterdir()), 300).save(path)
    return path


def test_a_saved_model_in_bfloat16(pages, folder, tmp_path):
    result = fathom("bench", "million", "--model", folder, "--text", pages, "--tokens", "1100", "--fact-tokens", "0",
                    "--dtype", "bfloat16", "--out", tmp_path / "x.json")
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "x.json").read_text())
    assert found["cache_nbytes"] == cache_bytes(ModelConfig.load(folder), 2).at(found["cache_tokens"])
    assert [mark["tokens"] for mark in found["marks"]] == [1024, 1100] and found["facts"] == []


@pytest.mark.parametrize("changes, words", [
    ({"tokens": 10**12}, "GB are free; give fewer --tokens"),
    ({"tokens": 10}, "tokens is 10 and chunk"),
    ({"chunk": 0}, "chunk 0"),
    ({"fact_tokens": 5}, "at least 1024, or 0"),
    ({"text": "nowhere"}, "nowhere does not exist"),
    ({"model": Path("nowhere")}, "neither a model folder"),
    ({"model": "folder", "tokens": 4096}, "give --tokens 4078 or fewer"),
    ({"dtype": "float8"}, "allowed: float32, bfloat16"),
    ({"out": Path("x.png")}, "ends in .json"),
])
def test_what_cannot_be_measured_is_refused_at_once(changes, words, folder, monkeypatch, tmp_path, pages):
    monkeypatch.chdir(tmp_path)
    out = changes.pop("out", None)
    if changes.get("model") == "folder":
        changes["model"] = folder
    with pytest.raises(FathomError, match=words):
        run_million(Settings(**{"tokens": 1024, "text": str(pages)} | changes), out, None)
    assert not list(tmp_path.iterdir())


def test_too_many_tokens_are_one_line_and_exit_code_2():
    result = fathom("bench", "million", "--tokens", str(10**12))
    assert result.returncode == 2 and result.stderr.startswith("fathom: ") and result.stderr.count("\n") == 1


def test_ctrl_c_shows_and_keeps_what_was_measured(tmp_path, pages):
    out = tmp_path / "x.json"
    with subprocess.Popen(command("bench", "million", "--tokens", "300000", "--text", pages, "--out", out),
                          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        lines = iter(process.stdout.readline, "")
        assert any("to decode one  peak" in line for line in lines)
        process.send_signal(signal.SIGINT)
        printed, errors = process.communicate()
    assert process.returncode == 130 and errors == "" and "stopped; what was measured so far" in printed
    assert "cache, by arithmetic" in printed
    found = json.loads(out.read_text())
    assert not found["complete"] and found["marks"][0]["tokens"] == 1024
    assert not list(tmp_path.glob(".*"))


def test_speed_is_kept_in_stretches():
    trace = SpeedTrace(128 * 10)
    for number in range(1, 9):
        trace.add(4 * number, 2.0 * number)
    assert trace.points == [(12, 2.0), (24, 2.0)] and trace.latest == 2.0
