"""GQA, MLA and DSA in V4's place: against transformers' own, any split = one pass, documents isolated, trained, served."""

import pytest
import torch
from transformers import AutoConfig
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.deepseek_v32 import modeling_deepseek_v32
from transformers.models.qwen3 import modeling_qwen3

from fathom import ops
from fathom.accounting import cache_bytes, parameters, released_cache_bytes
from fathom.checkpoint.released import load_model, save_model
from fathom.config import ModelConfig
from fathom.data.packing import Batch
from fathom.engine.engine import Engine
from fathom.engine.request import Request
from fathom.engine.sampler import Sampling
from fathom.engine.settings import EngineSettings
from fathom.errors import ConfigError
from fathom.model.layout import Layout
from fathom.model.transformer import Transformer
from fathom.optim.muon import AdamW, Muon, Optimizer
from fathom.text.tokenizer import Tokenizer
from fathom.train.objective import LossWeights, objective
from tests.models import random_model, random_tokens, small_config

KINDS = ["gqa", "mla", "dsa"]


def baseline_config(kind: str, layers: int = 2, **changes) -> ModelConfig:
    groups = {"num_key_value_heads": 2} if kind == "gqa" else {}
    return small_config([0] * layers, attention=kind, **({"index_topk": 6} | groups | changes))


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    return random_model(baseline_config(request.param)).double()


# ---- against transformers

def theirs(name: str, **settings):
    """A transformers config with eager attention; what is made from it gets the same random weights every time."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **settings)
    config._attn_implementation = "eager"
    return config


def attend(module, rotary, x_BSW, S):
    """Their attention's output [B, S, W] under a causal mask."""
    position = torch.arange(S)[None]
    mask = torch.full((1, 1, S, S), torch.finfo(x_BSW.dtype).min, dtype=x_BSW.dtype).triu(1)
    return module(x_BSW, position_embeddings=rotary(x_BSW, position), attention_mask=mask, position_ids=position)[0]


def ours(config, attention, x_BSW):
    B, S, _ = x_BSW.shape
    layout = Layout(config, torch.arange(S).expand(B, S), torch.full((B,), S), None)
    return attention(x_BSW, layout, None, None)[0]


def halves_to_pairs(weight: torch.Tensor, heads: int, rotary: int) -> torch.Tensor:
    """Rows [H * D, ...] whose trailing rotary channels are turned in halves (i with i + R / 2), reordered to neighbouring pairs."""
    rows = weight.unflatten(0, (heads, -1))
    plain, turned = rows[:, :rows.shape[1] - rotary], rows[:, rows.shape[1] - rotary:]
    return torch.cat([plain, turned.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)], 1).flatten(0, 1)


@pytest.mark.parametrize("tokens", [1, 70])
@torch.no_grad()
def test_gqa_equals_transformers_qwen3_attention(tokens):
    config = baseline_config("gqa", qk_rope_head_dim=32, index_head_dim=32, rope_scaling=None)
    attention = random_model(config).double().blocks[0].attention
    other = theirs("qwen3", hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-6,
                   rope_parameters={"rope_type": "default", "rope_theta": 160000.0})
    module = modeling_qwen3.Qwen3Attention(other, 0).double()
    x_BSW = torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for linear, source, heads in ((attention.query, module.q_proj, 4), (attention.key, module.k_proj, 2)):
        linear.weight.copy_(halves_to_pairs(source.weight, heads, 32))
    for norm, source in ((attention.query_norm, module.q_norm), (attention.key_norm, module.k_norm)):
        source.weight.copy_(torch.rand(32, generator=torch.Generator().manual_seed(1)) + 0.5)
        norm.weight.copy_(halves_to_pairs(source.weight, 1, 32))
    attention.value.weight.copy_(module.v_proj.weight)
    attention.output.weight.copy_(module.o_proj.weight)
    expected = attend(module, modeling_qwen3.Qwen3RotaryEmbedding(other), x_BSW, tokens)
    assert expected.std() > 0.01
    torch.testing.assert_close(ours(config, attention, x_BSW), expected, atol=1e-6, rtol=0)  # their angles are float32


def pairs_from_halves_first(weight: torch.Tensor, heads: int, rotary: int) -> torch.Tensor:
    """The same for rows whose leading channels are the turned ones: they come last, in pairs."""
    rows = weight.unflatten(0, (heads, -1))
    return halves_to_pairs(torch.cat([rows[:, rotary:], rows[:, :rotary]], 1).flatten(0, 1), heads, rotary)


LATENT = dict(hidden_size=64, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=32, kv_lora_rank=24, qk_nope_head_dim=32,
              qk_rope_head_dim=16, v_head_dim=32, head_dim=16, rms_norm_eps=1e-6,
              rope_parameters={"rope_type": "default", "rope_theta": 160000.0})


def copy_latent(attention, module):
    for linear, source in ((attention.query_down, module.q_a_proj), (attention.query_up, module.q_b_proj),
                           (attention.latent_down, module.kv_a_proj_with_mqa), (attention.output, module.o_proj)):
        linear.weight.copy_(source.weight)
    key_HDL, value_HDL = module.kv_b_proj.weight.unflatten(0, (4, 64)).split(32, 1)
    attention.key_up.weight.copy_(key_HDL.flatten(0, 1))
    attention.value_up.weight.copy_(value_HDL.flatten(0, 1))
    for norm, source in ((attention.query_norm, module.q_a_layernorm), (attention.latent_norm, module.kv_a_layernorm)):
        source.weight.copy_(torch.rand(len(source.weight), generator=torch.Generator().manual_seed(1)) + 0.5)
        norm.weight.copy_(source.weight)


@pytest.mark.parametrize("tokens", [1, 100])  # absorbed, expanded
@torch.no_grad()
def test_mla_equals_transformers_deepseek_v3_attention(tokens):
    config = baseline_config("mla", kv_lora_rank=48, rope_scaling=None)
    attention = random_model(config).double().blocks[0].attention
    assert attention.expands(tokens) is (tokens == 100)
    other = theirs("deepseek_v3", **(LATENT | {"kv_lora_rank": 48}))
    module = modeling_deepseek_v3.DeepseekV3Attention(other, 0).double()
    copy_latent(attention, module)
    x_BSW = torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = attend(module, modeling_deepseek_v3.DeepseekV3RotaryEmbedding(other), x_BSW, tokens)
    assert expected.std() > 0.003
    for expand in (False, True):
        attention.expands = lambda queries, expand=expand: expand
        torch.testing.assert_close(ours(config, attention, x_BSW), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("tokens", [5, 70])
@torch.no_grad()
def test_dsa_equals_transformers_deepseek_v32_attention(tokens):
    config = baseline_config("dsa", kv_lora_rank=24, index_topk=8, index_n_heads=8, index_head_dim=32, rope_scaling=None)
    attention = random_model(config).double().blocks[0].attention
    other = theirs("deepseek_v32", **LATENT, index_topk=8, index_n_heads=8, index_head_dim=32)
    module = modeling_deepseek_v32.DeepseekV32Attention(other, 0).double()
    copy_latent(attention, module)
    indexer, source = attention.indexer, module.indexer
    indexer.query_up.weight.copy_(pairs_from_halves_first(source.wq_b.weight, 8, 16))
    indexer.key.weight.copy_(pairs_from_halves_first(source.wk.weight, 1, 16))
    source.k_norm.weight.copy_(torch.rand(32, generator=torch.Generator().manual_seed(2)) + 0.5)
    source.k_norm.bias.copy_(torch.rand(32, generator=torch.Generator().manual_seed(3)) - 0.5)
    indexer.key_norm.weight.copy_(pairs_from_halves_first(source.k_norm.weight, 1, 16))
    indexer.key_norm.bias.copy_(pairs_from_halves_first(source.k_norm.bias, 1, 16))
    indexer.head_weights.weight.copy_(source.weights_proj.weight)
    x_BSW = torch.randn(2, tokens, 64, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = attend(module, modeling_deepseek_v32.DeepseekV32RotaryEmbedding(other), x_BSW, tokens)
    dense = modeling_deepseek_v3.DeepseekV3Attention(theirs("deepseek_v3", **LATENT), 0).double()
    dense.load_state_dict({name: tensor for name, tensor in module.state_dict().items() if "indexer" not in name})
    everything = attend(dense, modeling_deepseek_v32.DeepseekV32RotaryEmbedding(other), x_BSW, tokens)
    assert bool((everything - expected).abs().max() > 1e-3) is (tokens > 8)  # the selection matters
    for expand in (False, True):
        attention.expands = lambda queries, expand=expand: expand
        torch.testing.assert_close(ours(config, attention, x_BSW), expected, atol=2e-6, rtol=0)


# ---- one program

def in_chunks(model, tokens, sizes):
    cache = model.new_cache(tokens.shape[0], tokens.shape[1])
    return torch.cat([model(chunk, cache=cache).logits for chunk in tokens.split(sizes, 1)], 1)


@pytest.mark.parametrize("sizes", [[90], [89, 1], [1] * 90, [7, 50, 1, 1, 31], [60] + [1] * 30])
@torch.no_grad()
def test_any_split_equals_one_pass(model, sizes):
    tokens = random_tokens(model.config, 2, 90)
    whole = model(tokens).logits
    assert whole.std() > 0.1
    torch.testing.assert_close(in_chunks(model, tokens, sizes), whole, atol=1e-9, rtol=0)


@torch.no_grad()
def test_rows_of_a_ragged_batch_equal_the_same_rows_alone(model):
    lengths = torch.tensor([[5, 1, 30, 1], [31, 1, 0, 1], [1, 1, 1, 0]])
    rows = [random_tokens(model.config, int(total), seed=b) for b, total in enumerate(lengths.sum(1))]
    cache, got, done = model.new_cache(3, 60), [[], [], []], [0, 0, 0]
    for counts in lengths.T:
        chunk = torch.zeros(3, int(counts.max()), dtype=torch.int64)
        for b, count in enumerate(counts.tolist()):
            chunk[b, :count] = rows[b][done[b]:done[b] + count]
        logits = model(chunk, cache=cache, count_B=counts).logits
        for b, count in enumerate(counts.tolist()):
            got[b].append(logits[b, :count])
            done[b] += count
    for b, row in enumerate(rows):
        torch.testing.assert_close(torch.cat(got[b]), model(row[None]).logits[0], atol=1e-9, rtol=0)


@torch.no_grad()
def test_packed_documents_equal_the_documents_alone(model):
    lengths = [33, 1, 7, 40]
    tokens = random_tokens(model.config, 1, sum(lengths))
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    together = model(tokens, position_BS=positions).logits[0]
    alone = torch.cat([model(document[None]).logits[0] for document in tokens[0].split(lengths)])
    torch.testing.assert_close(together, alone, atol=1e-9, rtol=0)
    drafts = model.mtp_logits(tokens, positions)[0]
    torch.testing.assert_close(drafts[:32], model.mtp_logits(tokens[:, :33])[0], atol=1e-9, rtol=0)


@torch.no_grad()
def test_no_token_sees_a_later_one_and_the_last_sees_the_first(model):
    tokens = random_tokens(model.config, 1, 60)
    changed = tokens.clone()
    changed[:, 40:] = (changed[:, 40:] + 1) % model.config.vocab_size
    before, after = model(tokens).logits, model(changed).logits
    torch.testing.assert_close(before[:, :40], after[:, :40], atol=1e-12, rtol=0)
    assert (before[:, 40] - after[:, 40]).abs().max() > 1e-3
    changed = tokens.clone()
    changed[:, 0] = (changed[:, 0] + 1) % model.config.vocab_size
    assert (before[:, -1] - model(changed).logits[:, -1]).abs().max() > 1e-9


@pytest.mark.parametrize("name", ["definition", "fused", "gathered"])
@torch.no_grad()
def test_every_implementation_of_the_operator_agrees_even_where_nothing_is_seen(name):
    generator = torch.Generator().manual_seed(0)
    q, key, value = (torch.randn(shape, generator=generator) for shape in ((2, 9, 6, 8), (2, 64, 2, 8), (2, 64, 2, 5)))
    first = torch.tensor([[0] * 9, [3] * 9])
    count = torch.arange(0, 63, 7).expand(2, 9).clamp(max=61)
    selected = torch.stack([torch.stack([torch.cat([(first[b, s] + torch.randperm(int(count[b, s]), generator=generator)[:4]).sort().values,
                                                    torch.full((4 - min(4, int(count[b, s])),), -1)])
                                         for s in range(9)]) for b in range(2)])
    for chosen in (selected, None) if name != "gathered" else (selected,):
        expected = ops.grouped_attention.definition(q, key, value, first, count, chosen, 0.3)
        with ops.using(name):
            assert name == "definition" or ops.grouped_attention.choose(q, key, value, first, count, chosen, 0.3)[0] == name
            got = ops.grouped_attention(q, key, value, first, count, chosen, 0.3)
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        assert (got[:, 0] == 0).all()


def test_gradients_of_the_fast_path_equal_the_definitions(model):
    tokens = random_tokens(model.config, 1, 40)
    found = []
    for name in ("definition", "fused"):
        model.zero_grad()
        with ops.using(name):
            model(tokens).logits.square().sum().backward()
        found.append({key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None})
    assert found[0].keys() == found[1].keys()
    for key, grad in found[0].items():
        torch.testing.assert_close(found[1][key], grad, atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("phase", ["dense", "sparse"])
def test_training_lowers_the_losses_and_reaches_every_parameter(kind, phase):
    config = baseline_config(kind)
    model = Transformer(config).initialise(0)
    optimizer = Optimizer(model.named_parameters(), config, Muon(), AdamW())
    tokens = random_tokens(config, 2, 41)
    positions = torch.cat([torch.arange(25), torch.arange(15)]).expand(2, 40)
    batch = Batch(tokens[:, :-1], tokens[:, 1:].where(positions != 24, ops.IGNORE), positions)
    seen, reached = [], set()
    for _ in range(8):
        optimizer.zero_grad()
        losses = objective(model, batch, LossWeights(), 0.3, phase)
        losses.total.backward()
        reached |= {name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()}
        optimizer.step(0.01)
        seen.append(losses.parts)
    assert reached == {name for name, _ in model.named_parameters()}
    for name in ("loss", "mtp_loss"):
        assert seen[-1][name] < seen[0][name]


@pytest.mark.parametrize("phase", ["dense", "sparse"])
def test_the_token_indexer_learns_what_the_heads_read_and_nothing_else_feels_it(phase):
    model = random_model(baseline_config("dsa", 1, num_nextn_predict_layers=0, compress_ratios=[0]))
    indexer = [parameter for name, parameter in model.named_parameters() if ".indexer." in name]
    optimizer, seen, tokens = torch.optim.Adam(indexer, 0.01), [], random_tokens(model.config, 1, 40)
    for _ in range(12):
        model.zero_grad()
        observation = model.features(tokens, torch.arange(40)[None], [], phase).observations[0]
        observation.index_loss.backward()
        optimizer.step()
        seen.append(float(observation.index_loss))
    assert seen[-1] < 0.8 * seen[0]
    assert all((parameter.grad is not None) is (".indexer." in name) for name, parameter in model.named_parameters())


# ---- counted, stored, served

@pytest.mark.parametrize("kind", KINDS)
def test_counts_are_the_models_own(kind):
    config = baseline_config(kind, 3)
    with torch.device("meta"):
        model = Transformer(config)
    real = sum(tensor.numel() for key, tensor in model.state_dict().items() if not key.endswith("table"))
    assert real == parameters(config).total + parameters(config).mtp
    assert released_cache_bytes(config).at(500) > 0
    assert model.new_cache(2, 500).nbytes == 2 * cache_bytes(config).at(500)


@pytest.mark.parametrize("kind", KINDS)
def test_a_saved_baseline_loads_again_and_v4_configs_stay_as_released(kind, tmp_path):
    model = random_model(baseline_config(kind))
    save_model(model, tmp_path / "model")
    again, tokens = load_model(tmp_path / "model"), random_tokens(model.config, 1, 20)
    assert again.config.attention == kind
    assert torch.equal(again(tokens).logits, model(tokens).logits)
    assert not {"attention", "kv_lora_rank"} & small_config([0, 4]).to_dict().keys()


@pytest.mark.parametrize("drafts", [0, 2])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_engine_answers_like_whole_passes_and_shares_prefixes(kind, drafts):
    config = baseline_config(kind, vocab_size=320, max_position_embeddings=1000)
    engine = Engine(random_model(config), Tokenizer.train(["a small page of text"] * 3, 300), settings=EngineSettings(drafts=drafts))
    prompt = random_tokens(config, 300).tolist()
    for cached in (False, True):
        outputs = list(engine.run(Request(tuple(prompt), Sampling(temperature=0, max_tokens=8, ignore_eos=True))))
        got, expected = [written.token for output in outputs for written in output.tokens], []
        while len(expected) < 8:
            expected.append(int(engine.model(torch.tensor([prompt + expected])).logits[0, -1, :engine.tokenizer.vocab_size].argmax()))
        assert got == expected
        assert bool(engine.stats().hit_tokens) is cached


@pytest.mark.parametrize(("change", "words"), [
    ({"attention": "mqa"}, "attention is 'mqa'; allowed: \"v4\", \"gqa\""),
    ({"num_key_value_heads": 2}, "num_key_value_heads is 2; allowed: 1, or with attention \"gqa\""),
    ({"attention": "gqa", "num_key_value_heads": 3}, "num_key_value_heads is 3"),
    ({"attention": "gqa", "kv_lora_rank": 8}, "kv_lora_rank is 8; allowed: at least 1, with attention \"mla\""),
])
def test_a_wrong_field_is_one_clear_line(change, words):
    with pytest.raises(ConfigError) as error:
        ModelConfig.preset("tiny", **change)
    assert words in str(error.value)
