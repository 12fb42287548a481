"""What `fathom explain` records is what the model did: each number against the model's own parts, called plainly."""

import json

import pytest
import torch

from fathom import ops
from fathom.checkpoint.released import save_model
from fathom.lab.explain.page import Subject, page, tell
from fathom.lab.explain.record import attention_probabilities, early_logits, record
from fathom.lab.explain.run import MOST_TOKENS, untrained_example
from fathom.model.layout import Layout
from fathom.text.tokenizer import Tokenizer
from tests.models import random_model, random_tokens, small_config
from tests.runs import fathom

TOKENS = 150


@pytest.fixture(scope="module")
def model():
    """Window only, CSA with more entries than it may pick, HCA, CSA; every weight random."""
    return random_model(small_config([0, 4, 32, 4], sliding_window=16, num_hash_layers=1))


@pytest.fixture(scope="module")
def tokens(model):
    return random_tokens(model.config, TOKENS).tolist()


@pytest.fixture(scope="module")
def seen(model, tokens):
    return record(model, tokens)


@pytest.fixture(scope="module")
def block_inputs(model, tokens):
    """The streams before each block, and the layout, from a pass of our own over the blocks."""
    token_BS = torch.tensor([tokens])
    position_BS = torch.arange(len(tokens))[None]
    layout = Layout(model.config, position_BS, torch.tensor([len(tokens)]), None)
    X_BSNW, inputs = model.embed(token_BS)[:, :, None].expand(-1, -1, model.config.hc_mult, -1), []
    with torch.inference_mode():
        for block in model.blocks:
            inputs.append(X_BSNW)
            X_BSNW, _ = block(X_BSNW, token_BS, layout, None, None)
    return inputs, layout


def test_recording_leaves_the_answer_and_the_model_as_they_are(model, tokens, seen):
    with torch.inference_mode():
        logits = model(torch.tensor([tokens])).logits[0]
    assert torch.equal(seen.logits_SV, logits)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    for operator in (ops.attention, ops.open_streams, ops.collapse_coefficients):
        assert "observed" not in operator.implementations


def test_nothing_stays_behind_when_the_pass_fails(model):
    with pytest.raises(Exception, match="outside the vocabulary"):
        record(model, [10**6])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert "observed" not in ops.attention.implementations


def test_streams_and_their_coefficients_are_the_blocks_own(model, seen, block_inputs):
    inputs, _ = block_inputs
    for block, layer, X_BSNW in zip(model.blocks, seen.layers, inputs, strict=True):
        assert torch.equal(layer.connections[0].streams_SNW, X_BSNW[0])
        with torch.inference_mode():
            _, post, res = block.attention_streams.open(X_BSNW)
        assert torch.equal(layer.connections[0].post_SN, post[0]) and torch.equal(layer.connections[0].res_SNN, res[0])
        for connection in layer.connections:
            torch.testing.assert_close(connection.res_SNN.sum(-1), torch.ones_like(connection.pre_SN), atol=2e-3, rtol=0)
            torch.testing.assert_close(connection.res_SNN.sum(-2), torch.ones_like(connection.pre_SN), atol=1e-4, rtol=0)
    for before, after in zip(seen.layers, seen.layers[1:]):
        assert torch.equal(before.streams_SNW, after.connections[0].streams_SNW)


def test_picked_entries_are_those_of_the_indexer_and_the_best_by_score(model, seen, block_inputs):
    inputs, layout = block_inputs
    for number in (1, 3):
        block, layer = model.blocks[number], seen.layers[number]
        with torch.inference_mode():
            x_BSW = block.attention_norm(block.attention_streams.open(inputs[number])[0])
            latent_BSR = block.attention.query_norm(block.attention.query_down(x_BSW))
            picked_BSK = block.attention.indexer.select(block.attention.indexer(x_BSW, latent_BSR, layout, None), layout)
        assert torch.equal(layer.selected_SK, picked_BSK[0])
        for place in range(TOKENS):
            count = int(layer.count_S[place])
            assert count == (place + 1) // 4
            best = layer.score_SM[place, :count].topk(min(count, model.config.index_topk)).indices
            assert sorted(best.tolist()) == [slot for slot in layer.selected_SK[place].tolist() if slot >= 0]


def test_attention_by_hand_gives_the_operators_output(model, tokens):
    calls = []
    operator = ops.attention
    operator.implementations["test"] = (lambda *_: True, lambda *args: calls.append((args, operator.definition(*args))) or calls[-1][1])
    try:
        with torch.inference_mode():
            model(torch.tensor([tokens]))
    finally:
        del operator.implementations["test"]
    assert len(calls) == 4
    for (q, window, entries, sink), out in calls:
        with torch.inference_mode():
            over_window, over_entries = attention_probabilities(q, window, entries, sink)
            keys = window.kv_BTD[0] if entries is None else torch.cat([window.kv_BTD[0], entries.kv_BMD[0]])
            by_hand = torch.einsum("hsj,jd->shd", torch.cat([over_window, over_entries], -1), keys)
        torch.testing.assert_close(by_hand, out[0])


def test_attention_goes_to_what_a_token_may_read_and_sums_to_one(model, seen):
    place_S = torch.arange(TOKENS)
    for layer in seen.layers:
        torch.testing.assert_close(layer.share_SH3.sum(-1), torch.ones(layer.share_SH3.shape[:2]))
        back_ST = place_S[:, None] - place_S
        assert torch.equal(layer.window_ST > 0, (back_ST >= 0) & (back_ST < model.config.sliding_window))
        torch.testing.assert_close(layer.window_ST.sum(-1), layer.share_SH3[..., 0].mean(-1))
        if layer.entry_SM is not None:
            read = torch.zeros_like(layer.entry_SM, dtype=torch.bool)
            for place in range(TOKENS):
                slots = range(int(layer.count_S[place])) if layer.selected_SK is None else layer.selected_SK[place].tolist()
                read[place, [slot for slot in slots if slot >= 0]] = True
            assert torch.equal(layer.entry_SM > 0, read)


def test_experts_are_the_routers(model, tokens, seen, block_inputs):
    inputs, layout = block_inputs
    for number, (block, layer) in enumerate(zip(model.blocks, seen.layers, strict=True)):
        with torch.inference_mode():
            x = block.moe_norm(block.moe_streams.open(layer.connections[1].streams_SNW[None])[0])
            affinity, expert, weight = block.moe.router(x, torch.tensor([tokens]))
        assert torch.equal(layer.affinity_SE, affinity[0]) and torch.equal(layer.expert_SK, expert[0]) and torch.equal(layer.weight_SK, weight[0])
        if number == 0:
            assert torch.equal(layer.expert_SK, block.moe.router.table[torch.tensor(tokens)])


def test_the_last_early_answer_is_the_answer(model, seen):
    torch.testing.assert_close(early_logits(model, seen.layers[-1].streams_SNW), seen.logits_SV)


# ---- what the page is told


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["a text to cut into tokens"], 300)


@pytest.fixture(scope="module")
def story(model, tokenizer, seen):
    return json.loads(json.dumps(tell(model, tokenizer, seen, Subject("a model", True)), allow_nan=False))


def near(told, exact):
    torch.testing.assert_close(torch.tensor(told), exact, rtol=1e-3, atol=1e-6)


def test_the_told_probabilities_are_the_softmax_of_the_logits(model, tokens, story):
    with torch.inference_mode():
        probability_SV = model(torch.tensor([tokens])).logits[0].softmax(-1)
    for at, top in enumerate(story["top"]):
        near([p for _, p in top], probability_SV[at].topk(10).values)
        near([p for _, p in top], probability_SV[at, [id for id, _ in top]])
    assert len(story["next"]) == TOKENS - 1
    for at, (p, rank) in enumerate(story["next"]):
        near(p, probability_SV[at, tokens[at + 1]])
        assert rank == int((probability_SV[at] > probability_SV[at, tokens[at + 1]]).sum()) + 1


def test_the_story_holds_what_was_recorded(seen, story):
    assert story["first"] == 0 and [layer["kind"] for layer in story["layers"]] == ["window", "csa", "hca", "csa"]
    for told, layer in zip(story["layers"], seen.layers, strict=True):
        for at in (0, 3, 40, TOKENS - 1):
            near(told["window"][at], layer.window_ST[at, max(0, at - 15):at + 1])
            near(told["share"][at], layer.share_SH3[at])
            near(told["connections"][1]["res"][at], layer.connections[1].res_SNN[at])
            assert told["experts"][at] == layer.expert_SK[at].tolist()
            if "scores" in told:
                near(told["scores"][at], layer.score_SM[at, :int(layer.count_S[at])])
                assert told["picked"][at] == [slot for slot in layer.selected_SK[at].tolist() if slot >= 0]


def test_a_long_story_is_told_of_its_last_tokens(model, tokenizer, seen, story, monkeypatch):
    monkeypatch.setattr("fathom.lab.explain.page.MOST_NUMBERS", 20_000)
    short = tell(model, tokenizer, seen, Subject("a model", True))
    assert 0 < short["first"] < TOKENS and len(short["top"]) == TOKENS - short["first"]
    assert short["tokens"] == story["tokens"]
    assert short["layers"][1]["picked"][0] == story["layers"][1]["picked"][short["first"]]


def test_the_page_is_one_file_and_a_text_cannot_break_it(model):
    text = "</script><script>alert(1)</script><!-- <b>&"
    tokenizer = Tokenizer.train([text * 30], 300)
    tokens = [tokenizer.bos_id, *tokenizer.encode(text)]
    html = page(model, tokenizer, record(model, tokens), Subject("</title><script>", False))
    assert html.count("<script") == html.count("</script>") == 2 and "alert(1)" not in html.split('type="application/json">')[0]
    assert not any(outside in html for outside in ("src=", "http://", "https://", "@import", "url("))
    story = json.loads(html.split('type="application/json">')[1].split("</script>")[0])
    assert "".join(story["texts"][str(id)] for id in tokens[1:]) == text


# ---- the command


def test_explain_reads_a_model_folder(tmp_path, model, tokenizer):
    save_model(random_model(small_config([4, 32], vocab_size=tokenizer.vocab_size)), tmp_path / "model")
    tokenizer.save(tmp_path / "model")
    result = fathom("explain", tmp_path / "model", "--text", "cut into tokens", "--out", tmp_path / "page.html", timeout=300)
    assert result.returncode == 0 and "done: " in result.stdout, result.stderr
    assert '"name":"model","trained":true' in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_explain_without_a_model_says_that_it_is_untrained(tmp_path):
    result = fathom("explain", "--out", tmp_path / "page.html", timeout=300)
    assert result.returncode == 0, result.stderr
    assert '"name":"untrained example","trained":false' in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_explain_explains_itself():
    result = fathom("explain", "--help", timeout=300)
    assert result.returncode == 0 and "Example:  fathom explain " in result.stdout


@pytest.mark.parametrize("arguments, problem", [
    (("--text", ""), "the text is empty"), (("--text", "word " * 2000), f"at most {MOST_TOKENS}"), (("no/such/run",), "neither a model folder"),
])
def test_a_wrong_input_is_one_line(tmp_path, arguments, problem):
    result = fathom("explain", *arguments, "--out", tmp_path / "page.html", timeout=300)
    assert result.returncode == 2 and problem in result.stderr and result.stderr.count("\n") == 1
    assert not (tmp_path / "page.html").exists()


def test_the_example_is_the_same_for_the_same_seed():
    left, right, other = (untrained_example("a text", seed)[0] for seed in (1, 1, 2))
    assert torch.equal(left.head.weight, right.head.weight) and not torch.equal(left.head.weight, other.head.weight)
