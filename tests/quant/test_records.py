"""Cache records: the bytes of the release, and the numbers that come back from them."""

import ml_dtypes
import numpy as np
import pytest
import torch

from fathom.ops.rounding import ReleasedRounding
from fathom.quant.formats import round_fp4
from fathom.quant.records import (
    EntryRecord,
    KeyRecord,
    PlainRecord,
    entry_bytes,
    key_bytes,
)
from tests.quant.oracle import (
    E2M1_TABLE,
    E4M3_TABLE,
    FLOATS,
    assert_same_bits,
    blocks_by_definition,
    spread,
)

ENTRIES = [(512, 64), (64, 16), (96, 32), (700, 60)]
KEYS = [128, 33, 16, 48, 1]


def scale_bytes(scales):
    return (np.log2(scales) + 127).astype(np.uint8)


def entry_by_definition(x, rotary):
    """Bytes [N, ...] of entries x [N, D]: FP8 codes, rotary channels in BF16, scales, zeros up to a multiple of eight scales."""
    plain, rest = x[:, :-rotary].double().numpy(), x[:, -rotary:].float().numpy()
    _, codes, scales = blocks_by_definition(plain, 64, E4M3_TABLE, 1e-4)
    pad = np.zeros((len(x), -scales.shape[1] % 8), np.uint8)
    return np.concatenate([codes, rest.astype(ml_dtypes.bfloat16).view(np.uint8), scale_bytes(scales), pad], 1)


def key_by_definition(x):
    """Bytes [N, ...] of keys x [N, D]: two FP4 codes a byte, the even channel's low, and scales."""
    _, codes, scales = blocks_by_definition(x.double().numpy(), 32, E2M1_TABLE)
    codes = np.pad(codes, ((0, 0), (0, codes.shape[1] % 2)))
    return np.concatenate([codes[:, ::2] + 16 * codes[:, 1::2], scale_bytes(scales)], 1).astype(np.uint8)


def test_a_plain_record_holds_numbers_of_its_dtype():
    record, x = PlainRecord(8, torch.bfloat16), spread((3, 8), 1)
    assert record.width == 8 and record.dtype == torch.bfloat16
    assert_same_bits(record.unpack(record.pack(x)), x.bfloat16())


@pytest.mark.parametrize("channels, rotary, size", [
    (512, 64, 584), (64, 16, 48 + 32 + 8), (96, 32, 64 + 64 + 8), (576, 64, 512 + 128 + 8), (577, 64, 513 + 128 + 16)])
def test_the_size_of_an_entry(channels, rotary, size):
    record = EntryRecord(channels, rotary, torch.bfloat16)
    assert entry_bytes(channels, rotary) == record.width == size and record.dtype == torch.uint8
    assert record.pack(torch.zeros(2, 3, channels)).shape == (2, 3, size)


@pytest.mark.parametrize("channels, size", [(128, 68), (33, 17 + 2), (16, 8 + 1), (64, 32 + 2), (1, 1 + 1)])
def test_the_size_of_a_key(channels, size):
    record = KeyRecord(channels, torch.bfloat16)
    assert key_bytes(channels) == record.width == size and record.dtype == torch.uint8
    assert record.pack(torch.zeros(2, 3, channels)).shape == (2, 3, size)


def test_the_bytes_of_an_entry_written_out():
    x = torch.ones(512)  # scale 2^-8 (1 = 256 * 2^-8; with 2^-9 it would be 512)
    x[1], x[2], x[64:128], x[447], x[448], x[511] = -0.5, 2.0**-17, 448, 0, -2, 3.140625
    got = EntryRecord(512, 64, torch.float32).pack(x).tolist()
    one, minus_half, tiny, largest, zero = 0x78, 0xF0, 0x01, 0x7E, 0x00  # of e4m3: 256, -128, 2^-9, 448, 0
    assert got[:448] == [one, minus_half, tiny] + 61 * [one] + 64 * [largest] + 319 * [one] + [zero]
    assert got[448:576] == [0x00, 0xC0] + 62 * [0x80, 0x3F] + [0x49, 0x40]
    assert got[576:] == [119, 127, 119, 119, 119, 119, 119, 0]


def test_the_bytes_of_a_key_written_out():
    x = torch.zeros(128)
    x[:8] = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x[32:36] = torch.tensor([-0.0, -12, 2.5, 5])  # scale 2: 1.25 and 2.5 are ties
    x[127] = -0.25  # scale 2^-4
    got = KeyRecord(128, torch.float32).pack(x).tolist()
    assert got[:4] == [0x10, 0x32, 0x54, 0x76] and got[16:18] == [0xF8, 0x42] and got[63] == 0xE0
    assert not any(got[4:16]) and not any(got[18:63])
    assert got[64:] == [127, 128, 1, 123]


@pytest.mark.parametrize("channels, rotary", ENTRIES)
@pytest.mark.parametrize("dtype", FLOATS)
def test_entries_are_packed_as_defined(channels, rotary, dtype):
    x = spread((20, channels), 1, -30, 10).to(dtype)
    got = EntryRecord(channels, rotary, dtype).pack(x.view(4, 5, channels))
    assert np.array_equal(got.flatten(0, 1).numpy(), entry_by_definition(x, rotary))


@pytest.mark.parametrize("channels", KEYS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_keys_are_packed_as_defined(channels, dtype):
    x = spread((20, channels), 2, -30, 10).to(dtype)
    got = KeyRecord(channels, dtype).pack(x.view(4, 5, channels))
    assert np.array_equal(got.flatten(0, 1).numpy(), key_by_definition(x))


@pytest.mark.parametrize("channels, rotary", ENTRIES)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("unpacked", FLOATS)
def test_entries_come_back_as_the_rounding_makes_them(channels, rotary, dtype, unpacked):
    x, record = spread((3, 5, channels), 3, -30, 10).to(dtype), EntryRecord(channels, rotary, unpacked)
    expected = ReleasedRounding(rotary).entries(x)
    expected[..., -rotary:] = expected[..., -rotary:].bfloat16().to(dtype)
    got = record.unpack(record.pack(x))
    assert_same_bits(got, expected.to(unpacked))
    assert_same_bits(record.unpack(record.pack(got)), got)
    assert_same_bits(record.unpack(record.pack(expected)), got)


@pytest.mark.parametrize("channels", KEYS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("unpacked", FLOATS)
def test_keys_come_back_as_the_rounding_makes_them(channels, dtype, unpacked):
    x, record = spread((3, 5, channels), 4, -30, 10).to(dtype), KeyRecord(channels, unpacked)
    got = record.unpack(record.pack(x))
    assert_same_bits(got, round_fp4(x).to(unpacked))
    assert_same_bits(record.unpack(record.pack(got)), got)
    index = ReleasedRounding(0).index(x)
    assert_same_bits(record.unpack(record.pack(index)), index.to(unpacked))


@pytest.mark.parametrize("record", [EntryRecord(96, 32, torch.bfloat16), KeyRecord(96, torch.bfloat16)], ids=["entry", "key"])
def test_records_are_the_same_alone_in_a_batch_and_from_any_memory(record):
    x = spread((4, 6, 96), 5).bfloat16()
    together = record.pack(x)
    for index in np.ndindex(4, 6):
        assert torch.equal(record.pack(x[index]), together[index])
        assert_same_bits(record.unpack(together[index]), record.unpack(together)[index])
    assert torch.equal(record.pack(x.transpose(0, 1)), together.transpose(0, 1))
    assert torch.equal(record.pack(x.mT.contiguous().mT), together)
    every_other = together.repeat_interleave(2, -1)[..., ::2]
    assert_same_bits(record.unpack(every_other), record.unpack(together))
    assert record.unpack(record.pack(x[:0])).shape == (0, 6, 96)
