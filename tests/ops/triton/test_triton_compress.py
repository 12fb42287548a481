"""The pooling kernel against the definition in float64, under Triton's interpreter."""

import pytest

pytest.importorskip("triton", reason="Triton is not installed (pip install 'fathom[gpu]')")

import torch

import fathom.ops.triton.compress  # noqa: F401  (registers the implementation)
from fathom import ops
from fathom.config import kind_of_ratio
from fathom.model.cache import Cache
from fathom.model.layout import Layout
from tests.models import small_config

RAGGED = [[7, 3, 13], [23]]  # tokens of each document of a packed row
CASES = [(4, True, 6), (3, True, 5), (5, False, 6), (17, False, 3), (1, False, 4), (2, True, 130)]  # ratio, overlap, D; tiles are 16 tokens, 128 channels


def blocks(ratio, overlap, documents=RAGGED):
    """current, previous and has_previous of the complete blocks of packed rows, as the model lists them: see fathom.model.layout."""
    width, current, previous, has_previous = max(map(sum, documents)), [], [], []
    for row, lengths in enumerate(documents):
        start = row * width
        for length in lengths:
            for first in range(0, length // ratio * ratio, ratio):
                tokens = start + first + torch.arange(ratio)
                current.append(tokens)
                previous.append(tokens - ratio if first else torch.full_like(tokens, row * width))  # anything where there is none
                has_previous.append(first > 0)
            start += length
    current = torch.stack(current) if current else torch.zeros(0, ratio, dtype=torch.int64)
    if not overlap:
        return current, None, None
    return current, torch.stack(previous) if previous else current, torch.tensor(has_previous, dtype=torch.bool)


def tokens(overlap, D, documents=RAGGED, seed=0, dtype=torch.float32, size=1.0):
    """value and score [B, J, C]."""
    shape = len(documents), max(map(sum, documents)), 2 * D if overlap else D
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for scale in (1.0, size)]


def values_and_gradients(value, score, indices, implementation):
    leaves = [x.detach().requires_grad_() for x in (value, score)]
    with ops.using(implementation):
        assert ops.pool_blocks.choose(*leaves, *indices)[0] == implementation
        pooled = ops.pool_blocks(*leaves, *indices)
    cotangent = torch.randn(pooled.shape, generator=torch.Generator().manual_seed(9)).to(pooled.dtype)
    return [pooled, *torch.autograd.grad(pooled, leaves, cotangent)]


def assert_as_defined(value, score, indices):
    """Kernels against the definition in float64, relative to each tensor's largest entry; bfloat16 gradients are rounded once."""
    exact = values_and_gradients(value.double(), score.double(), indices, "definition")
    fast = values_and_gradients(value, score, indices, "triton")
    for expected, actual, dtype in zip(exact, fast, (torch.float32, value.dtype, score.dtype), strict=True):
        assert actual.shape == expected.shape and actual.dtype == dtype
        cut = 2**-7 if dtype == torch.bfloat16 else 0  # the interpreter cuts off what a GPU rounds
        assert ((actual - expected).abs() <= cut * expected.abs() + 1e-5 * expected.abs().max().clamp(min=1.0)).all()


@pytest.mark.parametrize(("ratio", "overlap", "D"), CASES)
def test_pooling_of_ragged_documents_is_the_definition(ratio, overlap, D):
    assert_as_defined(*tokens(overlap, D), blocks(ratio, overlap))


@pytest.mark.parametrize("overlap", [True, False])
def test_large_scores_keep_their_precision(overlap):
    assert_as_defined(*tokens(overlap, 6, size=30.0), blocks(5, overlap))


@pytest.mark.parametrize("overlap", [True, False])
def test_bfloat16_tokens_are_computed_with_exactly(overlap):
    assert_as_defined(*tokens(overlap, 6, dtype=torch.bfloat16), blocks(4, overlap))


@pytest.mark.parametrize("overlap", [True, False])
def test_halves_of_a_wider_tensor_are_read_in_place(overlap):
    value, score = tokens(overlap, 6)
    joined = torch.cat([value, score], -1)
    indices = blocks(4, overlap)
    apart, halves = (values_and_gradients(*x, indices, "triton") for x in ((value, score), joined.chunk(2, -1)))
    assert all(map(torch.equal, apart, halves))
    assert_as_defined(value.transpose(0, 1).contiguous().transpose(0, 1), score.repeat_interleave(2, -1)[..., ::2], indices)


def test_tokens_in_no_block_get_no_gradient():
    value, score = tokens(True, 6)
    current, previous, has_previous = blocks(4, True)
    _, *gradients = values_and_gradients(value, score, (current, previous, has_previous), "triton")
    for gradient in gradients:
        gradient = gradient.flatten(0, 1)
        pooled_before = set(previous[has_previous].flatten().tolist())
        for token in range(len(gradient)):
            assert bool(gradient[token, :6].count_nonzero()) == (token in pooled_before)
            assert bool(gradient[token, 6:].count_nonzero()) == (token in set(current.flatten().tolist()))


@pytest.mark.parametrize("overlap", [True, False])
def test_no_complete_block_gives_no_entry_and_no_gradient(overlap):
    documents = [[3], [2]]
    pooled, *gradients = values_and_gradients(*tokens(overlap, 6, documents), blocks(4, overlap, documents), "triton")
    assert pooled.shape == (0, 6) and all(x.count_nonzero() == 0 for x in gradients)


def test_blocks_that_never_have_one_before_are_the_definition():
    current, previous, has_previous = blocks(4, True)
    assert_as_defined(*tokens(True, 6), (current, previous, torch.zeros_like(has_previous)))


@pytest.mark.parametrize(("ratio", "overlap", "D"), [(4, True, 6), (17, False, 3)])
def test_a_block_alone_gives_the_same_bits_and_so_do_two_runs(ratio, overlap, D):
    value, score = tokens(overlap, D)
    indices = blocks(ratio, overlap)
    first, second = (values_and_gradients(value, score, indices, "triton") for _ in range(2))
    assert all(map(torch.equal, first, second))
    alone = [None if x is None else x[-1:] for x in indices]
    with ops.using("triton"):
        assert torch.equal(ops.pool_blocks(value, score, *alone), first[0][-1:])


@pytest.mark.parametrize("ratio", [4, 17])
@pytest.mark.parametrize("cached", [False, True])
def test_the_blocks_of_a_model_are_pooled_as_defined(ratio, cached):
    config = small_config([ratio], rope_scaling=None)
    B, S = 2, 37
    count = torch.tensor([S, S - 4])
    cache = Cache(config, B, 64, torch.float32, torch.device("cpu")) if cached else None
    layout = Layout(config, torch.arange(S).expand(B, S), count, cache)
    listed = layout.blocks[ratio]
    overlap = kind_of_ratio(ratio) == "csa"
    ring = (2 * ratio if overlap else ratio) if cached else 0
    value, score = tokens(overlap, 6, [[ring + S]] * B)
    assert_as_defined(value, score, (listed.current_NR, listed.previous_NR, listed.has_previous_N))


def test_float64_and_calls_that_do_not_ask_for_the_interpreter_do_without_it():
    value, score = tokens(False, 6)
    indices = blocks(4, False)
    assert ops.pool_blocks.choose(value, score, *indices)[0] != "triton"
    with ops.using("triton"):
        assert ops.pool_blocks.choose(value.double(), score.double(), *indices)[0] == "definition"
