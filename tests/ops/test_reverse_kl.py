"""Distillation's divergence: the definition against formulas, and the chunked path against the definition."""

import pytest
import torch
from torch.autograd import gradcheck

from fathom import ops
from fathom.ops.cpu import losses as cpu_losses


def problem(N, V, W=8, U=8, size=1.0, seed=0, dtype=torch.float32):
    """hidden [N, W] and head [V, W] of the student, hidden [N, U] and head [V, U] of the teacher; weights [N] of the tokens."""
    generator = torch.Generator().manual_seed(seed)
    hidden, head, teacher_hidden, teacher_head = (
        (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)
        for shape, scale in (((N, W), 1), ((V, W), size), ((N, U), 1), ((V, U), size)))
    return (hidden, head, teacher_hidden, teacher_head), torch.rand(N, generator=generator, dtype=torch.float64) - 0.3


def values_and_gradients(tensors, weight_N, implementation):
    """The divergence [N], and the gradients of hidden and head for its weighted sum."""
    leaves = [x.detach().requires_grad_() for x in tensors[:2]]
    with ops.using(implementation):
        assert ops.reverse_kl.choose(*leaves, *tensors[2:])[0] == implementation
        found = ops.reverse_kl(*leaves, *tensors[2:])
    return [found.detach(), *torch.autograd.grad((found * weight_N.to(found.dtype)).sum(), leaves)]


def assert_as_defined(problem, implementation="cpu", tolerance=1e-5):
    """An implementation in float32 against the definition in float64."""
    tensors, weight_N = problem
    exact = values_and_gradients([x.double() for x in tensors], weight_N, "definition")
    for expected, actual in zip(exact, values_and_gradients(tensors, weight_N, implementation), strict=True):
        assert actual.shape == expected.shape and actual.dtype == torch.float32
        assert not expected.numel() or (actual - expected).abs().max() <= tolerance * max(1.0, expected.abs().max())


def test_it_is_exact_with_its_gradients_for_teachers_of_another_width():
    (hidden, head, *teacher), weight = problem(11, 7, W=4, U=3, dtype=torch.float64)
    found, gradient, head_gradient = values_and_gradients((hidden, head, *teacher), weight, "definition")
    p, q = (torch.distributions.Categorical(logits=x) for x in (hidden @ head.T, teacher[0] @ teacher[1].T))
    torch.testing.assert_close(found, torch.distributions.kl_divergence(p, q))
    slope = p.probs * (p.probs.log() - q.probs.log() - found[:, None]) * weight[:, None]  # d KL / d logit_v = p_v (log p_v - log q_v - KL)
    torch.testing.assert_close(gradient, slope @ head)
    torch.testing.assert_close(head_gradient, slope.T @ hidden)
    assert gradcheck(lambda h, w: ops.reverse_kl(h, w, *teacher), (hidden.requires_grad_(), head.requires_grad_()))


@pytest.mark.parametrize("implementation", ["definition", "cpu"])
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(implementation):
    (hidden, head, *_), weight = problem(6, 9)
    assert all(x.abs().max() < 1e-6 for x in values_and_gradients((hidden, head, hidden, head), weight, implementation))


@pytest.mark.parametrize("N", [0, 1, 63, 64, 65, 200])
def test_on_cpu_it_is_the_definition_at_the_edges_of_chunks(N, monkeypatch):
    monkeypatch.setattr(cpu_losses, "_CHUNK_LOGITS", 50)  # chunks of _MIN_TOKENS = 64
    assert_as_defined(problem(N, 50, U=5))
    assert_as_defined(problem(N, 1))


def test_confident_students_and_teachers_keep_their_precision():
    (found, *gradients) = values_and_gradients(*problem(20, 30, size=20.0), "cpu")
    assert found.max() > 20 and all(x.isfinite().all() for x in gradients)
    assert_as_defined(problem(20, 30, size=20.0), tolerance=1e-4)  # logits of 60 are known to 4e-6, and so is the share of each class


def test_no_tensor_on_cpu_is_as_large_as_all_logits(monkeypatch):
    monkeypatch.setattr(cpu_losses, "_CHUNK_LOGITS", 64 * 512)
    largest = 0

    class Recording(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            largest = max([largest, *(x.numel() for x in (out if isinstance(out, tuple) else (out,)) if isinstance(x, torch.Tensor))])
            return out

    tensors, weight = problem(300, 512, W=4, U=4)
    with Recording():
        values_and_gradients(tensors, weight, "cpu")
    assert largest == 64 * 512


def test_only_the_gradients_asked_for_are_made(monkeypatch):
    (hidden, head, *teacher), weight = problem(12, 10)
    _, *gradients = values_and_gradients((hidden, head, *teacher), weight, "cpu")
    products, times = [], cpu_losses.times
    for only, expected in enumerate(gradients):
        leaves = [hidden.clone(), head.clone()]
        leaves[only].requires_grad_()
        found = ops.reverse_kl(*leaves, *teacher)
        products.clear()
        monkeypatch.setattr(cpu_losses, "times", lambda *args: products.append(args) or times(*args))
        assert torch.equal(torch.autograd.grad((found * weight.float()).sum(), leaves[only])[0], expected)
        assert len(products) == 3  # both logits anew, and one gradient


def test_the_teacher_gets_no_gradient_and_two_runs_give_the_same_bits():
    tensors, weight = problem(300, 2048, W=32, U=16)
    first, second = (values_and_gradients(tensors, weight, "cpu") for _ in range(2))
    assert all(map(torch.equal, first, second))
    leaves = [x.clone().requires_grad_() for x in tensors]
    for implementation in ("cpu", "definition"):
        with ops.using(implementation):
            found = ops.reverse_kl(*leaves)
        assert torch.autograd.grad(found.sum(), leaves[2:], allow_unused=True) == (None, None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_use_the_definition(dtype):
    tensors, _ = problem(3, 4, dtype=dtype)
    assert ops.reverse_kl.choose(*tensors)[0] == "definition"
