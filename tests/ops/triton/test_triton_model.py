"""A whole small model on the kernels: loss, gradients, prefill and decoding as the definitions have them."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed (pip install 'fathom[gpu]')")

import fathom.ops.triton.kernels  # noqa: F401  (registers them)
from fathom import ops
from fathom.data.packing import Batch
from fathom.engine.graphs import Graphs
from fathom.engine.paged_cache import PagedCache, Row
from fathom.ops.dispatch import Op
from fathom.ops.tape import Tape
from fathom.train.objective import LossWeights, objective
from tests.models import random_model, random_tokens, small_config

CONFIG = small_config([0, 4, 6, 4], sliding_window=8, index_topk=3, head_dim=32)
KERNELS = {"attention", "collapse_coefficients", "cross_entropy", "index_topk", "low_rank_queries", "pool_blocks", "rms_normalise", "rotate", "routed_experts",
           "stream_coefficients", "streams_in", "streams_out"}


@pytest.fixture()
def ran(monkeypatch):
    """Names of the operators whose kernels ran."""
    names, choose = set(), Op.choose

    def noted(self, *args, **kwargs):
        name, function = choose(self, *args, **kwargs)
        names.update([self.__name__] if name == "triton" else [])
        return name, function

    monkeypatch.setattr(Op, "choose", noted)
    return names


def batch():
    """One row of two documents."""
    tokens = random_tokens(CONFIG, 1, 31)
    positions = torch.cat([torch.arange(21), torch.arange(9)])[None]
    targets = tokens[:, 1:].clone()
    targets[0, 20] = ops.IGNORE
    return Batch(tokens[:, :-1], targets, positions)


def loss_and_gradients(model, implementation):
    model.zero_grad()
    with ops.using(implementation):
        losses = objective(model, batch(), LossWeights(), 0.3, "sparse")
        losses.total.backward()
    return losses.total.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_loss_and_gradients_are_those_of_the_definitions(ran):
    exact_loss, exact = loss_and_gradients(random_model(CONFIG).double(), "definition")
    assert not ran
    loss, gradients = loss_and_gradients(random_model(CONFIG), "triton")
    assert ran >= KERNELS
    assert abs(loss - exact_loss) < 1e-5 * exact_loss and gradients.keys() == exact.keys()
    for name, expected in exact.items():
        assert (gradients[name] - expected).abs().max() <= 2e-4 * expected.abs().max() + 1e-7, name


@torch.no_grad()
def test_prefill_and_decoding_are_those_of_the_definitions(ran):
    tokens, model = random_tokens(CONFIG, 1, 22), random_model(CONFIG)
    with ops.using("definition"):
        expected = model.double()(tokens).logits
    model, cache = model.float(), model.new_cache(1, 22)
    with ops.using("triton"):
        logits = torch.cat([model(part, cache=cache).logits for part in (tokens[:, :18], *tokens[:, 18:].split(1, 1))], 1)
    assert {"attention", "index_topk", "routed_experts", "stream_coefficients"} <= ran
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_decoding_step_can_be_recorded_since_its_kernels_ask_for_nothing(ran):
    model = random_model(CONFIG)
    cache = PagedCache(CONFIG, 5, 3, torch.float32, torch.device("cpu"))
    tokens, rows = random_tokens(CONFIG, 2, 21), [(0, [0, 1]), (1, [2, 3])]

    class Watched:
        apart = False

        def __call__(self, step):
            def again():
                with Tape():
                    logits_BV.copy_(step())

            logits_BV = torch.empty(2, CONFIG.vocab_size)
            return logits_BV, again

    with torch.inference_mode():
        model(tokens[:, :20], cache=cache.view([Row(slot, blocks, 0) for slot, blocks in rows], 24))
    with ops.using("triton"):
        got_BV = Graphs(model, cache, Row(2, [4], 0), Watched()).step([Row(slot, blocks, 20) for slot, blocks in rows], tokens[:, 20].tolist())
    with torch.no_grad():
        torch.testing.assert_close(got_BV, model(tokens).logits[:, -1], rtol=1e-4, atol=1e-4)
    assert ran >= {"attention", "index_topk", "routed_experts", "pool_blocks", "stream_coefficients"}
