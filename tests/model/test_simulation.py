"""load_model(..., simulate_quantization=True) rounds what the released code rounds, and nothing else; checked part by part.

Logits would not do: a sum that differs by 1e-7 may round to the next value. Rounding is written out here a second time.
"""

import pytest
import torch

import fathom
from fathom import ops
from fathom.checkpoint.layouts import LAYOUTS
from fathom.checkpoint.names import released_name
from fathom.checkpoint.released import save_model
from fathom.model.layers import Linear, rotate
from fathom.quant import rounding as rounding_module
from fathom.quant.rounding import EXACT, ReleasedRounding
from tests.models import random_model, random_tokens, small_config
from tests.quant.oracle import E2M1_TABLE, E4M3_TABLE, blocks_by_definition, sylvester

CONFIG = small_config([0, 4, 128], hidden_size=256, moe_intermediate_size=96, head_dim=160, index_head_dim=64, qk_rope_head_dim=32)
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
    torch.testing.assert_close(model(TOKENS).logits, exact(TOKENS).logits, atol=1e-4, rtol=0)
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
    place = torch.arange(64)[None]
    out = ops.attention.definition(rotate(q, angle[:, :, None]), ops.Window(keys, place, place, place), None, attention.sink)
    grouped = rotate(out, angle[:, :, None], inverse=True).flatten(2).unflatten(-1, (2, -1))
    expected = torch.einsum("bsgi,gri->bsgr", grouped, attention.output_down.weight.unflatten(0, (2, -1))).flatten(2)
    torch.testing.assert_close(calls[0], expected, atol=1e-4, rtol=0)
