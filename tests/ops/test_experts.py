"""Experts against the formula token by token, gradients, routing and the hash table."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fathom import ops
from fathom.model.moe import balanced_table


def problem(tokens, experts, chosen, width=5, hidden=4, dtype=torch.float32):
    generator = torch.Generator().manual_seed(tokens + experts)
    x = torch.randn(tokens, width, generator=generator, dtype=dtype)
    expert = torch.stack([torch.randperm(experts, generator=generator)[:chosen] for _ in range(tokens)])
    weight = torch.rand(tokens, chosen, generator=generator, dtype=dtype)
    matrices = [torch.randn(experts, *shape, generator=generator, dtype=dtype) * 3
                for shape in ((hidden, width), (hidden, width), (width, hidden))]
    return x, expert, weight, *matrices


@pytest.mark.parametrize(("tokens", "experts", "chosen"), [(1, 1, 1), (1, 8, 3), (2, 8, 8), (50, 4, 2), (7, 64, 1)])
def test_each_token_gets_the_weighted_sum_of_its_clamped_experts(tokens, experts, chosen):
    x, expert, weight, gate, up, down = problem(tokens, experts, chosen)
    out = ops.routed_experts(x, expert, weight, gate, up, down, 2.0)
    for n in range(tokens):
        expected = torch.zeros(5)
        for k, e in enumerate(expert[n].tolist()):
            hidden = F.silu((gate[e] @ x[n]).clamp(max=2.0)) * (up[e] @ x[n]).clamp(-2.0, 2.0)
            expected += down[e] @ (hidden * weight[n, k])
        torch.testing.assert_close(out[n], expected, atol=1e-4, rtol=1e-4)


def test_a_tokens_result_does_not_depend_on_the_other_tokens():
    x, expert, weight, *matrices = problem(40, 8, 3, dtype=torch.float64)
    together = ops.routed_experts(x, expert, weight, *matrices, 10.0)
    alone = torch.cat([ops.routed_experts(x[n:n + 1], expert[n:n + 1], weight[n:n + 1], *matrices, 10.0)
                       for n in range(40)])
    torch.testing.assert_close(together, alone, atol=1e-12, rtol=0)


def test_expert_gradients():
    x, expert, weight, *matrices = problem(6, 4, 2, dtype=torch.float64)
    inputs = [tensor.requires_grad_() for tensor in (x, weight, *matrices)]
    assert torch.autograd.gradcheck(
        lambda x, w, g, u, d: ops.routed_experts(x, expert, w, g, u, d, 2.5), inputs)


@settings(max_examples=60, deadline=None)
@given(tokens=st.integers(1, 300), experts=st.integers(1, 40), data=st.data())
def test_hash_table_is_distinct_balanced_and_seeded(tokens, experts, data):
    chosen = data.draw(st.integers(1, experts))
    table = balanced_table(tokens, experts, chosen, torch.Generator().manual_seed(1))
    assert table.shape == (tokens, chosen) and table.min() >= 0 and table.max() < experts
    assert all(len(set(row)) == chosen for row in table.tolist())
    counts = table.flatten().bincount(minlength=experts)
    assert counts.max() - counts.min() <= 1
    assert torch.equal(table, balanced_table(tokens, experts, chosen, torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(("tokens", "experts", "chosen", "width", "hidden"), [
    (1, 8, 3, 48, 40), (9, 4, 4, 64, 128), (200, 6, 2, 300, 260), (700, 32, 4, 64, 48)])
def test_experts_on_cpu_equal_the_definition_in_values_and_gradients(tokens, experts, chosen, width, hidden):
    x, expert, weight, *matrices = problem(tokens, experts, chosen, width, hidden)
    inputs = [x, weight, *(matrix * width**-0.5 for matrix in matrices)]
    results = []
    for implementation, dtype in (("definition", torch.float64), ("cpu", torch.float32)):
        x, weight, *matrices = leaves = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        with ops.using(implementation):
            assert ops.routed_experts.choose(x, expert, weight, *matrices, 1.5)[0] == implementation
            out = ops.routed_experts(x, expert, weight, *matrices, 1.5)
        grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
        results.append([out.detach(), *torch.autograd.grad(out, leaves, grad)])
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found.double(), expected, atol=1e-5 * float(expected.abs().max()), rtol=1e-4)
    with torch.no_grad():  # another order of the same steps
        alone = ops.routed_experts(*(tensor.detach() for tensor in (x, expert, weight, *matrices)), 1.5)
        torch.testing.assert_close(alone.double(), results[0][0], atol=1e-4, rtol=1e-4)
        assert torch.equal(alone, ops.routed_experts(*(tensor.detach() for tensor in (x, expert, weight, *matrices)), 1.5))


@torch.no_grad()
def test_bfloat16_experts_on_cpu_equal_the_definition_to_its_roundings():
    x, expert, weight, *matrices = problem(200, 6, 2, 64, 48)
    half = [x.bfloat16(), expert, weight, *((matrix * 0.1).bfloat16() for matrix in matrices)]
    with ops.using("cpu"):
        assert ops.routed_experts.choose(*half, 1.5)[0] == "cpu"
        found = ops.routed_experts(*half, 1.5)
    expected = ops.routed_experts.definition(*half, 1.5)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, atol=0.02 * float(expected.abs().max()), rtol=0.02)
