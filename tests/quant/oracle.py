"""Definitions by table, in float64 and numpy, that the tests of number formats hold the package against; and awkward inputs."""

import math

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st

BOUNDED = settings(max_examples=100, deadline=None, derandomize=True)
FLOATS = [torch.float32, torch.bfloat16]
SMALL = [(1, 2), (130, 34), (160, 96), (100, 130), (2, 5, 64)]  # small enough for torch to use one thread: fast on a busy machine
SHAPES = [*SMALL, (128, 128), (129, 258), (3, 5, 64), (2, 3, 1, 40)]
FLOAT32_MAX = float(torch.finfo(torch.float32).max)
HUGE = 3.4375 * 2.0**126  # 2.9e38; some larger float32 numbers are nearest to 4 * 2^126, which float32 does not hold
SMALLEST = 2.0**-126  # scale of a weight block


# ---- definitions: every code's value, the nearest, one block after the other

def minifloats(mantissa_bits, bias, count):
    """Values of the codes 0 ... count - 1 of a float format, ascending as the codes are."""
    unit, values = 2**mantissa_bits, []
    for code in range(count):
        exponent, mantissa = divmod(code, unit)
        values.append((mantissa + unit * (exponent > 0)) / unit * 2.0**(max(exponent, 1) - bias))
    return np.array(values)


E4M3_TABLE = minifloats(3, 7, 127)  # code 127 is NaN
E2M1_TABLE = minifloats(1, 1, 8)


def nearest_codes(x, table):
    """Codes (sign not among them) of the values nearest to |x| (float64), the even code where two are equally near."""
    middles = (table[:-1] + table[1:]) / 2
    codes = np.searchsorted(middles, np.abs(x), side="left")  # of two equally near values, the lower
    tie = np.isin(np.abs(x), middles)
    return codes + (tie & (codes % 2 == 1))


def nearest(x, table):
    return np.copysign(table[nearest_codes(x, table)], x)


def signed_codes(x, table):
    """Codes in uint8 with the sign bit above those of the table."""
    sign = 128 if len(table) > 8 else 8
    return (nearest_codes(x, table) + sign * np.signbit(x)).astype(np.uint8)


def scale_by_definition(block, table, smallest=0.0):
    """2^ceil(log2(amax / limit)); log2 in float64 is exact enough for amax in float32."""
    largest = max(np.abs(block).max(), smallest)
    return max(2.0**math.ceil(math.log2(largest / table[-1])), SMALLEST) if largest else SMALLEST


def blocks_by_definition(x, block, table, smallest=0.0):
    """x [..., C] (float64) rounded block by block, the codes, and the scales [..., ceil(C / block)]."""
    rows = x.reshape(-1, x.shape[-1])
    values, codes, scales = np.empty_like(rows), np.empty(rows.shape, np.uint8), []
    for row, row_values, row_codes in zip(rows, values, codes, strict=True):
        for start in range(0, len(row), block):
            part = slice(start, start + block)
            scales.append(scale_by_definition(row[part], table, smallest))
            row_values[part] = nearest(row[part] / scales[-1], table) * scales[-1]
            row_codes[part] = signed_codes(row[part] / scales[-1], table)
    return values.reshape(x.shape), codes.reshape(x.shape), np.array(scales).reshape(*x.shape[:-1], -1)


def tiles_by_definition(x):
    """Codes [O, I] and scales of x [O, I] (float64) in FP8, tile after tile."""
    codes = np.empty(x.shape, np.uint8)
    scales = np.empty([-(-size // 128) for size in x.shape])
    for o, i in np.ndindex(scales.shape):
        tile = slice(128 * o, 128 * o + 128), slice(128 * i, 128 * i + 128)
        scales[o, i] = scale_by_definition(x[tile], E4M3_TABLE)
        codes[tile] = signed_codes(x[tile] / scales[o, i], E4M3_TABLE)
    return codes, scales


def sylvester(size):
    """The Hadamard matrix [size, size] of +-1."""
    matrix = np.ones((1, 1))
    while len(matrix) < size:
        matrix = np.kron(np.array([[1, 1], [1, -1]]), matrix)
    return matrix


def bits(x):
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(got, expected):
    """Of one dtype and shape, the sign of zero included."""
    assert got.dtype == expected.dtype and got.shape == expected.shape
    assert torch.equal(bits(got), bits(expected))


def spread(shape, seed, low=-20, high=20):
    """Random float32 numbers, a row's size between 2^low and 2^high, each 16 channels up to 2^12 below it, every seventh zero."""
    generator = torch.Generator().manual_seed(seed)
    row = torch.randint(low, high + 1, (*shape[:-1], 1), generator=generator)
    below = torch.randint(0, 13, (*shape[:-1], -(-shape[-1] // 16)), generator=generator)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x *= 2**(row - below).double().repeat_interleave(16, -1)[..., :shape[-1]]
    x.view(-1)[::7] = 0
    return x.float()


@st.composite
def vectors(draw, low=-150, high=127):
    """Between 1 and 200 float32 numbers of mixed sizes, up to +-HUGE and down to subnormal, zeros of both signs."""
    special = st.sampled_from([0.0, -0.0, HUGE, 1e-38, -1e-40, 1e-4, 448.0, 6.0, 2.5, -5.0, 0.25])
    value = st.floats(-HUGE, HUGE, width=32) | special
    start = draw(st.lists(value, max_size=8))
    x = spread((draw(st.integers(1, 200)),), draw(st.integers(0, 999)), low, draw(st.integers(low, high)))
    return torch.cat([torch.tensor(start), x.clamp(-HUGE, HUGE)])


@st.composite
def matrices(draw):
    """Float32 matrices of awkward shapes, each row of its own size, some of the numbers from `vectors`."""
    low = draw(st.integers(-150, 127))
    x = spread(draw(st.sampled_from(SMALL)), draw(st.integers(0, 999)), low, draw(st.integers(low, 127)))
    values = draw(vectors())[:x.numel()]
    x.view(-1)[:len(values)] = values
    return x.clamp(-HUGE, HUGE)
