"""load_model(..., simulate_quantization=True) rounds what the released code rounds, and nothing else; checked part by part.

Logits would not do: a sum that differs by 1e-7 may round to the next value. Rounding is written out here a second time.
"""

import pytest
import torch
import torch.nn.functional as F

import fathom
from fathom import ops
from fathom.checkpoint.layouts import LAYOUTS
from fathom.checkpoint.names import released_name
from fathom.checkpoint.released import save_model
from fathom.model.layers import Linear
from fathom.ops import rounding as rounding_module
from fathom.ops.rounding import EXACT, ReleasedRounding
from tests.models import random_model, random_tokens, small_config
from tests.quant.oracle import E2M1_TABLE, E4M3_TABLE, blocks_by_definition, spread, sylvester

CONFIG = small_config([0, 4, 128], hidden_size=256, moe_intermediate_size=96, head_dim=160, index_head_dim=64,
                      qk_rope_head_dim=32)
TOKENS = random_tokens(CONFIG, 2, 140)
ROUNDED = ("attn.wq_a", "attn.wq_b", "attn.wkv", "attn.wo_b", "indexer.wq_b", "shared_experts.w1", "shared_experts.w2",
           "shared_experts.w3", "e_proj", "h_proj")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("simulated")
    for layout in LAYOUTS:
        save_model(random_model(CONFIG), root / layout, layout=layout)
    return root


def fp8(x, block):
    return torch.from_numpy(blocks_by_definition(x.double().numpy(), block, E4M3_TABLE, 1e-4)[0]).to(x.dtype)


def turned_fp4(x):
    turned = (x.double() @ torch.from_numpy(sylvester(x.shape[-1])).double() * x.shape[-1] ** -0.5).to(x.dtype)
    return torch.from_numpy(blocks_by_definition(turned.double().numpy(), 32, E2M1_TABLE)[0]).to(x.dtype)


def is_nearly(got, expected, share=0.99):
    """Equal but for the few numbers that another order of summing moved over a border."""
    close = (got.float() - expected.float()).abs() <= 1e-6 * (1 + expected.float().abs())
    return close.float().mean() > share and expected.float().std() > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_window_keys_and_entries_are_in_fp8_but_for_the_rotary_channels(folders, dtype):
    model = fathom.load_model(folders / "official-fp4", dtype, simulate_quantization=True)
    seen = {}
    for layer, block in enumerate(model.blocks):
        for name, norm in (("window", block.attention.key_value_norm), ("entries", block.attention.compressor
                                                                         and block.attention.compressor.norm)):
            if norm is not None:
                norm.register_forward_hook(lambda _, args, out, key=(layer, name): seen.__setitem__(key, out))
    cache = model.new_cache(2, 140)
    model(TOKENS, cache=cache)
    plain = CONFIG.head_dim - CONFIG.qk_rope_head_dim
    for layer, state in enumerate(cache.layers):
        window = state.window.items_BRC.roll(128 - 140 % 128, 1)  # the last 128 tokens in order
        normed = seen[layer, "window"][:, -128:]
        assert is_nearly(window[..., :plain], fp8(normed[..., :plain], 64))
        assert not is_nearly(window[..., :plain], normed[..., :plain], 0.5)
        if dtype == torch.float32:  # turned, not rounded
            assert is_nearly(window[..., plain:].norm(dim=-1), normed[..., plain:].norm(dim=-1))
        if state.entries is not None:
            stored = state.entries.entries(140 // CONFIG.ratio(layer))
            assert is_nearly(stored.flatten(0, 1)[:, :plain], fp8(seen[layer, "entries"][:, :plain], 64))


@torch.no_grad()
def test_index_queries_and_keys_are_turned_and_in_fp4(folders):
    model = fathom.load_model(folders / "fp32", simulate_quantization=True)
    exact = fathom.load_model(folders / "fp32")
    for one in (model, exact):
        one.calls = []
        one.blocks[1].attention.indexer.register_forward_hook(lambda _, args, out, calls=one.calls: calls.append(out))
    cache, plain = model.new_cache(2, 140), exact.new_cache(2, 140)
    # The first layer's rounding would move the indexer's inputs; both models get the exact model's.
    captured = []
    exact.blocks[1].attention.register_forward_pre_hook(lambda _, args: captured.append(args[0]))
    exact(TOKENS, cache=plain)
    model.blocks[1].attention.register_forward_pre_hook(lambda _, args: (captured[0], *args[1:]))
    model(TOKENS, cache=cache)
    (q, w, k), (exact_q, exact_w, exact_k) = model.calls[0], exact.calls[0]
    assert is_nearly(q, turned_fp4(exact_q)) and is_nearly(k, turned_fp4(exact_k)) and torch.equal(w, exact_w)
    assert torch.equal(cache.layers[1].keys.entries(35), k)
    assert len(k.unique()) < len(exact_k.unique()) / 4


def linear_roundings(model):
    """The released names of all linear layers, and whether their inputs are rounded."""
    return {released_name(f"{name}.weight"): module.rounding is not EXACT
            for name, module in model.named_modules() if isinstance(module, Linear)}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", ["official-fp4", "official-fp8"])
def test_inputs_are_rounded_where_weights_are_stored_in_fp8_or_fp4_but_for_wo_a(folders, layout, packed):
    model = fathom.load_model(folders / layout, packed=packed, simulate_quantization=True)
    for name, rounded in linear_roundings(model).items():
        assert rounded == name.removesuffix(".weight").endswith(ROUNDED), name
    assert all(isinstance(block.moe.experts.rounding, ReleasedRounding) for block in [*model.blocks, *model.mtp])
    shared = {id(module.rounding) for module in model.modules() if getattr(module, "rounding", EXACT) is not EXACT}
    assert len(shared) == 1  # one object


@torch.no_grad()
def test_a_linear_layer_multiplies_rounded_inputs(folders):
    model = fathom.load_model(folders / "official-fp4", simulate_quantization=True)
    x, layer = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)), model.blocks[0].attention.query_down
    expected = fp8(x, 128).double() @ layer.weight.double().T
    torch.testing.assert_close(layer(x).double(), expected, atol=1e-5, rtol=0)
    assert (layer(x) - x @ layer.weight.T).abs().max() > 1e-3


def test_an_unquantised_folder_has_exact_inputs_and_rounded_entries(folders):
    model = fathom.load_model(folders / "bf16", simulate_quantization=True)
    assert not any(linear_roundings(model).values())
    assert all(block.moe.experts.rounding is EXACT for block in model.blocks)
    assert all(isinstance(block.attention.rounding, ReleasedRounding) for block in [*model.blocks, *model.mtp])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_without_simulation_nothing_is_rounded(folders, layout):
    model = fathom.load_model(folders / layout)
    assert all(getattr(module, "rounding", EXACT) is EXACT for module in model.modules())


@torch.no_grad()
def test_the_hadamard_rotation_alone_changes_nothing(folders, monkeypatch):
    exact, model = (fathom.load_model(folders / "fp32", simulate_quantization=on) for on in (False, True))
    monkeypatch.setattr(rounding_module, "round_fp4", lambda x: x)
    monkeypatch.setattr(rounding_module, "round_fp8", lambda x, block: x)
    torch.testing.assert_close(model(TOKENS).logits, exact(TOKENS).logits, atol=1e-5, rtol=0)
    x = spread((3, 64), 1)
    torch.testing.assert_close(model.blocks[1].attention.rounding.index(x), x @ torch.from_numpy(sylvester(64)).float() / 8)
    monkeypatch.undo()
    assert (model(TOKENS).logits - exact(TOKENS).logits).abs().mean() > 1e-3


@torch.no_grad()
def test_the_inverse_rotation_and_scores_are_not_rounded(folders):
    """Attention itself is exact: on the rounded keys it is the operator's definition."""
    model = fathom.load_model(folders / "fp32", simulate_quantization=True)
    calls = []
    model.blocks[0].attention.output_up.register_forward_pre_hook(lambda _, args: calls.append(args[0]))
    queries = []
    model.blocks[0].attention.query_up.register_forward_hook(lambda _, args, out: queries.append(out))
    cache = model.new_cache(1, 64)
    model(TOKENS[:1, :64], cache=cache)
    keys = cache.layers[0].window.items_BRC[:, :64]
    attention = model.blocks[0].attention
    q = queries[0].unflatten(-1, (4, -1))
    q = q * (q.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    angle = torch.arange(64).float()[None, :, None] * CONFIG.rope_theta ** -(torch.arange(0, 32, 2) / 32)
    turn, place = torch.polar(torch.ones_like(angle), angle), torch.arange(64)[None]
    out = ops.attention.definition(ops.rotate(q, turn[:, :, None]), ops.Window(keys, place, place, place), None, attention.sink)
    grouped = ops.rotate(out, turn[:, :, None], inverse=True).flatten(2).unflatten(-1, (2, -1))
    expected = torch.einsum("bsgi,gri->bsgr", grouped, attention.output_down.weight.unflatten(0, (2, -1))).flatten(2)
    torch.testing.assert_close(calls[0], expected, atol=1e-4, rtol=0)


# ---- what is multiplied, bit for bit: from the numbers that really went in, by the same product

SETTINGS = [("official-fp4", True), ("official-fp8", True), ("official-fp4", False), ("bf16", True)]


def rounds_inputs(layout, simulated):
    return simulated and layout != "bf16"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout, simulated", SETTINGS)
@torch.no_grad()
def test_every_linear_layer_gives_the_product_with_its_rounded_or_exact_input(folders, layout, simulated, dtype):
    model, seen = fathom.load_model(folders / layout, dtype, simulate_quantization=simulated), {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            key = released_name(f"{name}.weight").removesuffix(".weight")
            module.register_forward_hook(lambda one, args, out, key=key: seen.update({key: (one, args[0], out)}))
    model.mtp_logits(TOKENS[:1, :20])  # the trunk, the MTP block and the head
    for name, (module, x, out) in seen.items():
        x = x.float() if module.wide else x
        exact, rounded = (ops.linear(each, module.weight.to(x.dtype)) for each in (x, fp8(x, 128)))
        assert torch.equal(out, rounded if rounds_inputs(layout, simulated) and name.endswith(ROUNDED) else exact), name
        assert not torch.equal(rounded, exact), name
    assert seen.keys() >= {
        "layers.1.attn.wq_a", "layers.1.attn.indexer.wq_b", "layers.1.attn.indexer.weights_proj", "layers.2.attn.compressor.wkv",
        "layers.1.attn.indexer.compressor.wkv", "layers.0.ffn.shared_experts.w2", "mtp.0.e_proj", "mtp.0.attn.wo_b", "head"}


@pytest.mark.parametrize("layout, simulated", SETTINGS)
@torch.no_grad()
def test_wo_a_multiplies_exact_inputs(folders, layout, simulated):
    attention = fathom.load_model(folders / layout, simulate_quantization=simulated).blocks[1].attention
    out = spread((2, 5, 4, CONFIG.head_dim), 1, -14, 3)
    given = []
    attention.output_up.register_forward_pre_hook(lambda _, args: given.append(args[0]))
    ops.join_heads(out, torch.ones(2, 5, 16, dtype=torch.complex64), attention.output_down.matrix, attention.output_up, 2)
    exact, rounded = (ops.grouped_linear(x.flatten(2).unflatten(-1, (2, -1)), attention.output_down.matrix) for x in (out, fp8(out, 128)))
    assert torch.equal(given[0], exact) and not torch.equal(given[0], rounded)


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("layout, simulated", SETTINGS)
@torch.no_grad()
def test_the_router_gets_exact_inputs_and_experts_rounded_ones(folders, layout, simulated, layer):
    """One token at a time, so that gate and up are the very same calls; the routing weight goes into the rounding before down."""
    moe = fathom.load_model(folders / layout, simulate_quantization=simulated).blocks[layer].moe
    limit, on = CONFIG.swiglu_limit, rounds_inputs(layout, simulated)
    experts = moe.experts.gate, moe.experts.up, moe.experts.down
    shared = [part.weight for part in (moe.shared.gate, moe.shared.up, moe.shared.down)]

    def expert(x, gate, up, down, weight, on):
        given = fp8(x, 128) if on else x
        hidden = F.silu(F.linear(given, gate).clamp(max=limit)) * F.linear(given, up).clamp(-limit, limit) * weight
        return F.linear(fp8(hidden, 128) if on else hidden, down)

    def whole(x, token, on):
        affinity = F.softplus(F.linear(x, moe.router.weight)).sqrt()
        chosen = moe.router.table[token] if layer == 0 else (affinity + moe.router.bias).topk(3).indices
        weight = affinity.gather(-1, chosen) / affinity.gather(-1, chosen).sum() * CONFIG.routed_scaling_factor
        return expert(x, *shared, 1, on) + sum(expert(x, *(stack[e] for stack in experts), w, on)
                                               for e, w in zip(chosen[0].tolist(), weight[0], strict=True))

    for seed in range(5):
        x, token = spread((1, CONFIG.hidden_size), seed, -14, 2), torch.tensor([7 * seed])
        got = moe(x[None], token[None], None, False)[0][0]
        assert (got - whole(x, token, on)).abs().max() < 2e-6 * got.abs().max()
        assert (got - whole(x, token, not on)).abs().max() > 1e-4 * got.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout, simulated", SETTINGS)
@torch.no_grad()
def test_attention_gets_rounded_keys_and_exact_queries_in_every_block(folders, monkeypatch, layout, simulated, dtype):
    """Their plain channels, which no rotation touches, bit for bit; of the rotary ones the length. The first 36 keys will do."""
    model = fathom.load_model(folders / layout, dtype, simulate_quantization=simulated)
    blocks, plain = [*model.blocks, *model.mtp], CONFIG.head_dim - CONFIG.qk_rope_head_dim
    calls, queries, normed, attend = [], [], {}, ops.attention
    monkeypatch.setattr(ops, "attention", lambda *args: (calls.append(args), attend(*args))[1])
    for number, block in enumerate(blocks):
        attention = block.attention
        attention.query_up.register_forward_hook(lambda _, args, out: queries.append(out))
        attention.key_value_norm.register_forward_hook(lambda _, args, out, key=(number, "window"): normed.update({key: out}))
        if attention.compressor is not None:
            attention.compressor.norm.register_forward_hook(
                lambda _, args, out, key=(number, "entries"): normed.update({key: out}))
    model.mtp_logits(TOKENS[:1])
    assert len(calls) == len(queries) == len(blocks) == 4 and len(normed) == 6
    for number, (q, window, entries, _) in enumerate(calls):
        for name, kv in (("window", window.kv_BTD), ("entries", entries and entries.kv_BMD)):
            if kv is not None:
                kv, source = kv[0, :36], normed[number, name].flatten(0, -2)[:36]
                rounded = fp8(source[:, :plain], 64)
                assert torch.equal(kv[:, :plain], rounded if simulated else source[:, :plain])
                assert not torch.equal(rounded, source[:, :plain])
                tolerance = 1e-6 if dtype == torch.float32 else 2**-8
                torch.testing.assert_close(kv[:, plain:].float().norm(dim=-1), source[:, plain:].float().norm(dim=-1),
                                           atol=0, rtol=tolerance)
        heads = queries[number].unflatten(-1, (4, -1)).float()
        exact = heads * (heads.square().mean(-1, keepdim=True) + CONFIG.rms_norm_eps).rsqrt()
        torch.testing.assert_close(q[..., :plain].float(), exact[..., :plain], atol=1e-6, rtol=1e-6 if dtype == torch.float32 else 2**-8)


@torch.no_grad()
def test_without_simulation_index_vectors_are_neither_turned_nor_rounded(folders):
    model, calls = fathom.load_model(folders / "official-fp4"), []
    indexer, plain = model.blocks[1].attention.indexer, CONFIG.index_head_dim - CONFIG.qk_rope_head_dim
    for module in (indexer.query_up, indexer.compressor.norm, indexer):
        module.register_forward_hook(lambda _, args, out: calls.append(out))
    model(TOKENS)
    made, normed, (q, _, keys) = calls
    assert torch.equal(q[..., :plain], made.unflatten(-1, (-1, CONFIG.index_head_dim))[..., :plain])
    assert torch.equal(keys.flatten(0, 1)[:, :plain], normed[:, :plain])


@torch.no_grad()
def test_packed_linear_layers_multiply_the_same_rounded_inputs(folders):
    plain, packed = (fathom.load_model(folders / "official-fp8", packed=kept, simulate_quantization=True)
                     for kept in (False, True))
    compared = 0
    for one, other in zip(plain.modules(), packed.modules(), strict=True):
        if isinstance(one, Linear) and other.scale is not None:
            x = spread((3, one.weight.shape[1]), 5, -14, 2)
            torch.testing.assert_close(other(x), one(x), atol=1e-5, rtol=0)
            compared += 1
    assert compared == 4 * 8 + 1 + 2  # of three layers and the MTP block, an indexer, the MTP block's own
