"""Kernels for parts of a sublayer: bit for bit what the layers' own kernels give one after the other, and near the definition in float64."""

import pytest
import torch
from torch import nn

from fathom import ops
from fathom.model.layers import Linear, RMSNorm
from fathom.ops.native.library import library
from fathom.ops.rounding import EXACT, ReleasedRounding
from fathom.quant.formats import E8M0
from fathom.quant.records import EntryRecord, KeyRecord
from tests.models import random_model, random_tokens, small_config
from tests.ops import test_linear
from tests.ops.test_native import DTYPES, native, random

pytestmark = pytest.mark.skipif(library() is None, reason="there is no C compiler")
EPS, TURNED = 1e-6, 8
ROUNDINGS = {"exact": EXACT, "as released": ReleasedRounding(2 * TURNED)}


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def linear(outputs, inputs, seed, kind, rounding=EXACT, wide=False):
    """A layer with random weights: float32 or bfloat16 ones, or FP8 or FP4 codes."""
    layer = Linear(inputs, outputs, wide)
    if kind in DTYPES:
        layer.weight = nn.Parameter(random(outputs, inputs, seed=seed, dtype=torch.float32 if wide else kind) * inputs**-0.5)
    else:
        packed = test_linear.packed(kind, E8M0, (outputs, inputs), seed, low=117, high=121)
        layer.weight, layer.scale = nn.Parameter(packed.codes, requires_grad=False), packed.scale
    layer.rounding = rounding
    return layer


def norm(width, seed):
    layer = RMSNorm(width, EPS)
    layer.weight = nn.Parameter(1 + 0.1 * random(width, seed=seed))
    return layer


def turns(B, S, seed=9):
    return torch.polar(torch.ones(B, S, TURNED), 3 * random(B, S, TURNED, seed=seed))


def queries(kind, dtype, rounding, B=2, S=2):
    return ops.low_rank_queries, random(B, S, 160, dtype=dtype), linear(96, 160, 1, kind, rounding), norm(96, 2), linear(3 * 40, 96, 3, kind, rounding), 3, turns(B, S), EPS


def index(kind, dtype, rounding, B=2, S=2):
    return ops.index_queries, random(B, S, 96, dtype=dtype), linear(4 * 48, 96, 1, kind, rounding), 4, turns(B, S), rounding


def key(kind, dtype, rounding, B=2, S=2):
    return ops.shared_key, random(B, S, 160, dtype=dtype), linear(100, 160, 1, kind, rounding), norm(100, 2), turns(B, S), rounding


def join(kind, dtype, rounding, B=2, S=2):
    return ops.join_heads, random(B, S, 4, 48, dtype=dtype), turns(B, S), linear(64, 96, 1, kind).matrix, linear(130, 64, 2, kind, rounding), 2


def swiglu(kind, dtype, rounding, B=2, S=2):
    return ops.swiglu_expert, random(B, S, 160, dtype=dtype), *(linear(*shape, seed, kind, rounding) for seed, shape in enumerate([(96, 160), (96, 160), (160, 96)])), 0.7


def compressor(kind, dtype, rounding, B=2, S=2):
    value, gate = (linear(72, 160, seed, torch.float32, wide=True) for seed in (1, 2))
    return ops.compressor_inputs, random(B, S, 160, dtype=dtype), value, gate, random(4, 72, seed=3), torch.arange(B * S).view(B, S) + 5


def route(kind, dtype, rounding, B=2, S=2):
    return ops.route, random(B, S, 160, dtype=dtype), random(24, 160, seed=1), 1.5, random(24, seed=2), 5, torch.stack([torch.randperm(24)[:5] for _ in range(B * S)]).view(B, S, 5)


def streams(kind, dtype, rounding, B=2, S=2):
    return ops.open_streams, random(B, S, 4, 160, dtype=dtype), random(24, 640, seed=1), random(24, seed=2), random(3, seed=3), 20, 1e-6, EPS


PARTS = [queries, index, key, join, swiglu, compressor, route, streams]
KINDS = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), *((kind, dtype) for kind in ("fp8", "fp4") for dtype in DTYPES)]


def several(found):
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("kind, dtype", KINDS)
@pytest.mark.parametrize("part", PARTS)
def test_a_part_is_bit_for_bit_its_steps(part, kind, dtype, rounding):
    """The definition calls the operators for few tokens that `test_native` checks."""
    operator, *arguments = part(kind, dtype, ROUNDINGS[rounding])
    found, expected = several(native(operator, *arguments)), several(operator.definition(*arguments))
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        if part in (route, swiglu, streams):  # where a step is torch's
            torch.testing.assert_close(one, other, atol=1e-6, rtol=8e-3 if part is streams and dtype is torch.bfloat16 else 1e-5)
        else:
            assert torch.equal(one, other)
    assert all(torch.equal(one, other) for one, other in zip(found, several(native(operator, *arguments)), strict=True))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("part", PARTS)
def test_neither_threads_nor_other_tokens_show(part, threads, monkeypatch):
    operator, *arguments = part("fp8", torch.float32, ROUNDINGS["as released"])
    before, together = torch.get_num_threads(), several(native(operator, *arguments))
    tokens = arguments[0].shape[:2]

    def alone(x, at):
        return x[at:at + 1, 1:2] if isinstance(x, torch.Tensor) and x.shape[:2] == tokens else x

    try:
        torch.set_num_threads(threads)
        for row in (0, 1):
            one = several(native(operator, *(alone(x, row) for x in arguments)))
            assert all(torch.equal(found[row, 1], own[0, 0]) for found, own in zip(together, one, strict=True))
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("part", [queries, index, key, join, swiglu, compressor])
def test_a_layer_that_is_more_than_its_class_is_called(part):
    """With a hook, a forward of its own, or another module in its place, as adapters bring; and called it gives the same numbers."""
    operator, *arguments = part(torch.float32, torch.float32, EXACT)
    expected = several(native(operator, *arguments))
    layers = [number for number, x in enumerate(arguments) if isinstance(x, nn.Module)]
    for number in layers:
        layer, calls = arguments[number], []
        handle = layer.register_forward_hook(lambda *_: calls.append(1))
        assert operator.choose(*arguments)[0] != "native"
        found = several(operator(*arguments))
        assert calls == [1]
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-5)
        handle.remove()
        assert operator.choose(*arguments)[0] == "native"

        class Other(type(layer)):
            def forward(self, x):
                return super().forward(x)

        for other in (nn.Sequential(layer), lambda x, layer=layer: layer(x)):
            assert operator.choose(*[other if place == number else x for place, x in enumerate(arguments)])[0] != "native"
        own = layer.__class__
        layer.__class__ = Other
        assert operator.choose(*arguments)[0] != "native"
        layer.__class__ = own


SIZES = [1e-42, 1e-30, 1e-5, 1.0, 3e4, 1e30]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("channels", [32, 48, 96, 128])
def test_index_vectors_are_rounded_as_the_formats_say(channels, size):
    """Through a matrix that changes nothing, zeros, ties and numbers at both ends of float32 among the vectors."""
    layer = Linear(channels, channels)
    layer.weight = nn.Parameter(torch.eye(channels))
    x = size * random(2, 3, channels)
    x[0, 0], x[0, 1] = 0, size * (torch.arange(channels) % 13 - 6) / 4
    rounding, turn = ReleasedRounding(2 * TURNED), torch.ones(2, 3, TURNED, dtype=torch.complex64)
    found = native(ops.index_queries, x, layer, 1, turn, rounding)
    assert torch.equal(found[:, :, 0], rounding.index(ops.linear(x, layer.weight)))


@pytest.mark.parametrize("size", SIZES[1:])
@pytest.mark.parametrize("channels", [64, 128, 130, 300])
def test_inputs_are_rounded_as_the_formats_say(channels, size):
    layer = Linear(channels, channels)
    layer.weight, layer.rounding = nn.Parameter(torch.eye(channels)), ReleasedRounding(2 * TURNED)
    x = size * random(2, 3, channels)
    x[0, 0], x[0, 1] = 0, size * (torch.arange(channels) - 7) / 16
    turn = torch.ones(2, 3, TURNED, dtype=torch.complex64)
    assert torch.equal(native(ops.index_queries, x, layer, 1, turn)[:, :, 0], layer.rounding.inputs(x))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels, turned", [(512, 64), (96, 16), (70, 6), (34, 2)])
def test_records_hold_the_same_bytes_and_give_the_same_numbers(channels, turned, dtype, size):
    x = (size * random(2, 5, channels)).to(dtype)
    x[0, 0], x[0, 1], x[0, 2, ::3] = 0, (size * (torch.arange(channels) % 13 - 6) / 4).to(dtype), 0
    for record in (EntryRecord(channels, turned, dtype), KeyRecord(channels, dtype), KeyRecord(channels - 1, dtype)):
        x = x[..., :record.channels]
        packed = native(ops.pack, x, record)
        assert torch.equal(packed, record.pack(x))
        larger = torch.cat([packed, torch.full_like(packed, 255)], 1)
        for records in (packed, larger[:, :5], larger[1:, :2]):
            assert torch.equal(native(ops.unpack, records, record), record.unpack(records))
    every = torch.arange(256, dtype=torch.uint8).repeat(record.width, 1).T.contiguous()[None]  # each code under each scale
    found, expected = native(ops.unpack, every, record), record.unpack(every)
    assert torch.equal(found[:, :255], expected[:, :255])


@pytest.mark.parametrize("kind, dtype", KINDS)
def test_experts_round_as_the_release_does(kind, dtype):
    """Through matrices of one 1 a row, so that sums are exact and only the activation function may differ, by a rounding."""
    E, F, W, N, K = 3, 96, 160, 5, 2
    rounding, x = ReleasedRounding(2 * TURNED), random(N, W, dtype=dtype)
    expert, weight = torch.tensor([[0, 2], [1, 0], [2, 1], [0, 1], [1, 2]]), torch.rand(N, K) + 0.5
    shapes = [(F, W), (F, W), (W, F)]
    if kind in DTYPES:
        matrices = [torch.stack([torch.eye(*shape).roll(e, 1) for e in range(E)]).to(kind) for shape in shapes]
    else:
        matrices = [test_linear.packed(kind, E8M0, (E, *shape), seed, low=118, high=122) for seed, shape in enumerate(shapes)]
    found, expected = (f(x, expert, weight, *matrices, 10.0, rounding) for f in (lambda *args: native(ops.routed_experts, *args), ops.routed_experts.definition))
    close = (found - expected).abs() <= (1e-5 if dtype == torch.float32 else 1e-2) * expected.abs().max()  # the definition's last products are bfloat16
    assert close.float().mean() > 0.95 and (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize("experts, chosen", [(1, 1), (8, 8), (300, 6)])
def test_the_best_experts_are_chosen(experts, chosen):
    x, embedding, bias = random(2, 3, 40), random(experts, 40, seed=1), random(experts, seed=2)
    affinity, expert, weight = native(ops.route, x, embedding, 2.5, bias, chosen)
    expected = ops.route.definition(x.double(), embedding.double(), 2.5, bias.double(), chosen)
    torch.testing.assert_close(affinity.double(), expected[0], atol=1e-5, rtol=1e-5)
    order, other = expert.sort(-1), expected[1].sort(-1)
    assert torch.equal(order.values, other.values)
    torch.testing.assert_close(weight.gather(-1, order.indices).double(), expected[2].gather(-1, other.indices), atol=1e-5, rtol=1e-5)
    huge = native(ops.route, 1e30 * x, embedding, 2.5, bias, chosen)
    assert huge[0].isfinite().all() and ((huge[1] >= 0) & (huge[1] < experts)).all()
    lost = native(ops.route, torch.full_like(x, float("nan")), embedding, 2.5, bias, chosen)
    assert ((lost[1] >= 0) & (lost[1] < experts)).all() and lost[2].isnan().all()


@pytest.mark.parametrize("wrong", [-1, 24, 1 << 40])
def test_an_expert_that_does_not_exist_is_an_error_and_no_crash(wrong):
    operator, *arguments = route(None, torch.float32, None)
    arguments[-1][1, 0, 2] = wrong
    with pytest.raises(IndexError, match=f"none of the 24: .*{wrong}"):
        native(operator, *arguments)


@pytest.mark.parametrize("part", PARTS)
def test_what_does_not_fit_is_left_to_torch(part):
    operator, *arguments = part(torch.float32, torch.float32, EXACT)
    assert operator.choose(*arguments)[0] == "native"
    x, *others = arguments
    many = torch.cat([x] * 100)
    for other in (x[..., :-8], x.double(), x.half(), x[:0], *([] if part is streams else [many])):  # streams: see test_native_streams
        assert operator.choose(other, *others)[0] != "native"
    for place, argument in enumerate(others):
        if isinstance(argument, torch.Tensor) and argument.dim() > 1:
            wrong = [*others[:place], argument[..., :-1], *others[place + 1:]]
            if part is not compressor or argument.is_floating_point():
                assert operator.choose(x, *wrong)[0] != "native" or argument.is_complex()
    with torch.enable_grad():
        assert operator.choose(*arguments)[0] != "native" or part is streams


@pytest.mark.parametrize("quantized", [False, True])
def test_decoding_in_the_release_s_numbers_is_the_definition(quantized):
    """Token after token from the same state: a sum that rounds elsewhere moves a number, so most logits are near, none is far."""
    model = random_model(small_config([0, 4, 128], hidden_size=128, head_dim=96, index_head_dim=64, qk_rope_head_dim=16))
    rounding = ReleasedRounding(16)
    for module in model.modules():
        if hasattr(type(module), "rounding"):
            module.rounding = rounding
    token_BS, logits = random_tokens(model.config, 2, 140), {}
    for name in ("native", "definition"):
        cache = model.new_cache(2, 140, quantized)
        with ops.using("definition"):
            model(token_BS[:, :130], cache=cache)
        with ops.using(name):
            logits[name] = torch.cat([model(token_BS[:, at:at + 1], cache=cache).logits for at in range(130, 140)], 1)
    apart = (logits["native"] - logits["definition"]).abs()
    assert apart.median() < 0.01 * logits["definition"].std() and apart.max() < logits["definition"].std()
