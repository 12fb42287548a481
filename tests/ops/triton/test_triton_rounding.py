"""The kernels that round and pack: the bits of the definitions, under Triton's interpreter."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install 'fathom[gpu]')")

import torch
from hypothesis import given, settings

import fathom.ops.triton.rounding  # noqa: F401  (registers them)
from fathom import ops
from fathom.ops.rounding import ReleasedRounding
from fathom.quant.records import EntryRecord, KeyRecord, PlainRecord
from tests.quant.oracle import FLOATS, assert_same_bits, spread, vectors


def assert_as_defined(operator, *args):
    """The kernel runs, with the definition's bits; returns them."""
    with ops.using("triton"):
        assert operator.choose(*args)[0] == "triton"
        got = operator(*args)
    expected = operator.definition(*args)
    if expected.is_floating_point():
        assert_same_bits(got, expected)
    else:
        assert got.dtype == expected.dtype and torch.equal(got, expected)
    return got


@pytest.mark.parametrize("shape", [(3, 5, 256), (4, 200), (2, 48), (300,), (2, 1, 1)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_inputs(shape, dtype):
    assert_as_defined(ops.round_inputs, spread(shape, 1, -25, 10).to(dtype))


@pytest.mark.parametrize("channels, rotary", [(512, 64), (64, 16), (96, 32), (200, 8), (70, 0)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_entries(channels, rotary, dtype):
    assert_as_defined(ops.round_entries, spread((3, 7, channels), 2, -25, 10).to(dtype), rotary)


@pytest.mark.parametrize("channels", [32, 64, 96, 128, 512])
@pytest.mark.parametrize("dtype", FLOATS)
def test_index_vectors(channels, dtype):
    x = spread((5, 7, channels), 3, -20, 20).to(dtype)
    assert_as_defined(ops.round_index, x)
    assert_as_defined(ops.round_index, x * 2.0**-60)


@pytest.mark.parametrize("channels, rotary", [(512, 64), (64, 16), (96, 32), (700, 60), (33, 2), (66, 0)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_records_of_entries(channels, rotary, dtype):
    record = EntryRecord(channels, rotary, dtype)
    records = assert_as_defined(ops.pack, spread((3, 5, channels), 4, -25, 8).to(dtype), record)
    numbers = assert_as_defined(ops.unpack, records, record)
    assert_same_bits(assert_as_defined(ops.unpack, assert_as_defined(ops.pack, numbers, record), record), numbers)


@pytest.mark.parametrize("channels", [128, 33, 16, 48, 1])
@pytest.mark.parametrize("dtype", FLOATS)
def test_records_of_keys(channels, dtype):
    record = KeyRecord(channels, dtype)
    records = assert_as_defined(ops.pack, spread((3, 5, channels), 5, -60, 60).to(dtype), record)
    assert_as_defined(ops.unpack, records, record)


def test_every_code_and_scale_is_unpacked():
    codes, scales = torch.arange(256, dtype=torch.uint8).expand(255, 256), torch.arange(255, dtype=torch.uint8)[:, None]
    entry, key = EntryRecord(258, 2, torch.float32), KeyRecord(512, torch.float32)
    records = torch.cat([codes, torch.zeros(255, 4, dtype=torch.uint8), scales.expand(255, 8)], 1)
    with ops.using("triton"):
        got = ops.unpack(records, entry)
    no_number = codes[0] & 127 == 127
    assert got[:, :256][:, no_number].isnan().all()
    assert_same_bits(got[:, :256][:, ~no_number], ops.unpack.definition(records, entry)[:, :256][:, ~no_number])
    assert_as_defined(ops.unpack, torch.cat([codes, scales.expand(255, 16)], 1), key)
    with ops.using("triton"):
        assert ops.unpack(torch.tensor([[0x22, 255]], dtype=torch.uint8), KeyRecord(2, torch.float32)).isnan().all()


@given(vectors())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_numbers_of_all_sizes(x):
    assert_as_defined(ops.round_inputs, x)
    assert_as_defined(ops.pack, x, KeyRecord(len(x), torch.float32))
    entry = torch.cat([x, torch.zeros(2)])
    assert_as_defined(ops.round_entries, entry, 2)
    assert_as_defined(ops.pack, entry, EntryRecord(len(entry), 2, torch.float32))


@pytest.mark.parametrize("part", ["inputs", "entries", "index"])
def test_the_rounding_object_uses_them_and_gradients_pass_straight_through(part):
    x, grad, rounding = spread((4, 128), 6).requires_grad_(), spread((4, 128), 7, -3, 3), ReleasedRounding(64)
    expected, slope = (f(getattr(rounding, part)(x)) for f in (torch.Tensor.detach, lambda y: torch.autograd.grad(y, x, grad)[0]))
    with ops.using("triton"):
        got = getattr(rounding, part)(x)
    assert_same_bits(got.detach(), expected)
    assert_same_bits(torch.autograd.grad(got, x, grad)[0], slope)


def test_layout_does_not_matter():
    x = spread((6, 64, 9), 8).mT
    record = EntryRecord(64, 16, torch.float32)
    for operator, *more in ((ops.round_inputs,), (ops.round_entries, 16), (ops.round_index,), (ops.pack, record)):
        assert_as_defined(operator, x, *more)
    records = ops.pack.definition(x, record)
    for part in (records[:, 2:7], records[:, ::2], records[0], records[0, 0], records.transpose(0, 1)):
        assert_as_defined(ops.unpack, part, record)


def test_what_the_kernels_do_not_take_is_left_to_the_definitions():
    x = spread((2, 48), 9)
    with ops.using("triton"):
        assert ops.round_index.choose(x)[0] == "definition"  # turned by 16, scaled by 32
        for operator, *more in ((ops.round_inputs,), (ops.round_entries, 16), (ops.pack, EntryRecord(48, 16, torch.float32))):
            assert operator.choose(x[:0], *more)[0] == operator.choose(x.double(), *more)[0] == "definition"
        assert ops.round_entries.choose(x, 48)[0] == "definition"
        assert ops.pack.choose(x, EntryRecord(48, 48, torch.float32))[0] == "definition"
        plain = PlainRecord(48, torch.bfloat16)
        assert ops.pack.choose(x, plain)[0] == ops.unpack.choose(x, plain)[0] == "definition"
