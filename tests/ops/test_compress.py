"""Pooling against the equations written out, and its gradients in float64."""

import pytest
import torch

from fathom import ops
from fathom.model.compressor import Compressor
from fathom.model.layout import Layout
from tests.models import small_config


def whole_blocks(rows, tokens, ratio, overlap):
    """Flat indices of all complete blocks of unpacked rows."""
    current = torch.arange(tokens // ratio * ratio).view(-1, ratio)
    current = (torch.arange(rows)[:, None, None] * tokens + current).flatten(0, 1)
    first = torch.arange(tokens // ratio).repeat(rows) == 0
    previous = torch.where(first[:, None], current, current - ratio)
    return (current, previous, ~first) if overlap else (current, None, None)


@pytest.mark.parametrize(("ratio", "overlap"), [(4, True), (3, True), (128, False), (5, False)])
def test_entries_are_the_per_channel_softmax_means_of_the_report(ratio, overlap):
    torch.manual_seed(0)
    D, tokens = 6, 2 * ratio + 1
    value, score = torch.randn(2, 2, tokens, 2 * D if overlap else D)
    pooled = ops.pool_blocks(value, score, *whole_blocks(2, tokens, ratio, overlap)).view(2, 2, D)
    for row in range(2):
        for block in range(2):
            for d in range(D):
                here = range(block * ratio, (block + 1) * ratio)
                pairs = [(score[row, t, D + d if overlap else d], value[row, t, D + d if overlap else d]) for t in here]
                if overlap and block:
                    pairs += [(score[row, t - ratio, d], value[row, t - ratio, d]) for t in here]
                weights = torch.stack([s for s, _ in pairs]).softmax(0)
                expected = sum(w * v for w, (_, v) in zip(weights, pairs, strict=True))
                torch.testing.assert_close(pooled[row, block, d], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("overlap", [True, False])
def test_pooling_gradients(overlap):
    torch.manual_seed(0)
    value, score = (torch.randn(2, 9, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    indices = whole_blocks(2, 9, 4, overlap)
    assert torch.autograd.gradcheck(lambda v, s: ops.pool_blocks(v, s, *indices), (value, score))


@pytest.mark.parametrize("ratio", [4, 32])
def test_compressor_gradients(ratio):
    config = small_config([ratio], rope_scaling=None)
    module = Compressor(6, 16, ratio, 1e-6).double()
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, 0, 0.5, generator=generator)
    x = torch.randn(1, 2 * ratio + 1, 6, dtype=torch.float64, generator=generator, requires_grad=True)
    layout = Layout(config, torch.arange(x.shape[1])[None], torch.tensor([x.shape[1]]), None)
    parameters = dict(module.named_parameters())

    def run(x, *values):
        return torch.func.functional_call(module, dict(zip(parameters, values, strict=True)), (x, layout, None)).kv_BMD

    assert torch.autograd.gradcheck(run, (x, *parameters.values()), fast_mode=True)


def test_no_complete_block_gives_no_entry():
    config = small_config([4])
    module = Compressor(6, 16, 4, 1e-6)
    x = torch.randn(2, 3, 6)
    entries = module(x, Layout(config, torch.arange(3).expand(2, 3), torch.tensor([3, 3]), None), None)
    assert entries.kv_BMD.shape == (2, 0, 16)


def test_inverse_rotation_undoes_rotation_and_scores_depend_on_distance_only():
    torch.manual_seed(0)
    config = small_config([4])
    q, k = torch.randn(2, 32, dtype=torch.float64)
    layout = Layout(config, torch.arange(3)[None], torch.tensor([3]), None)

    def turned(x, position):
        return ops.rotate(x, layout.turn(torch.tensor(position), compressed=True))

    turn = layout.turn(torch.tensor(77), compressed=True)
    torch.testing.assert_close(ops.rotate(turned(q, 77), turn, inverse=True), q, atol=1e-6, rtol=0)
    assert torch.equal(turned(q, 5)[:16], q[:16])  # only the trailing channels turn
    torch.testing.assert_close(turned(q, 40) @ turned(k, 13), turned(q, 1027) @ turned(k, 1000), atol=1e-4, rtol=0)
