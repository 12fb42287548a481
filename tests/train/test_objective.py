"""The training loss: what is predicted where, what the indexer learns from, how routers are steered."""

import pytest
import torch

from fathom.data.packing import Batch
from fathom.errors import RecipeError
from fathom.ops import IGNORE
from fathom.train.objective import LossWeights, move_router_biases, objective
from fathom.train.phases import attending, check_phases
from tests.models import random_model, random_tokens, small_config

CONFIG = small_config([0, 4, 16], sliding_window=16, index_topk=4)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG)


def batch(lengths, rows=1):
    tokens = random_tokens(CONFIG, rows, sum(lengths) + 1)
    positions = torch.cat([torch.arange(length) for length in lengths]).expand(rows, -1)
    return Batch(tokens[:, :-1], tokens[:, 1:].clone(), positions)


def test_loss_is_the_mean_negative_log_likelihood_of_the_targets(model):
    data = batch([40, 24])
    data.targets_BS[:, :10] = IGNORE
    losses = objective(model, data, LossWeights(), 0.0, "sparse")
    log_probability = model(data.tokens_BS, position_BS=data.positions_BS).logits.log_softmax(-1)
    expected = -log_probability[0, torch.arange(10, 64), data.targets_BS[0, 10:]].mean()
    assert losses.parts["loss"] == pytest.approx(expected.item(), abs=1e-5)
    assert "mtp_loss" not in losses.parts


def test_mtp_loss_predicts_the_token_after_the_next_one_inside_its_document(model):
    data = batch([40, 24])
    losses = objective(model, data, LossWeights(), 0.3, "sparse")
    nll, count = 0.0, 0
    tokens = torch.cat([data.tokens_BS, data.targets_BS[:, -1:]], 1)[0]
    # Position t of a document sees t + 1 and predicts t + 2; both must be inputs or targets of that document.
    for begin, length in ((0, 40), (40, 24)):
        document = tokens[begin:begin + length + 1]
        log_probability = model.mtp_logits(document[None])[0].log_softmax(-1)
        for t in range(length - 1):
            nll -= log_probability[t, document[t + 2]].item()
            count += 1
    assert losses.parts["mtp_loss"] == pytest.approx(nll / count, abs=1e-5)


def test_the_indexer_learns_only_from_its_own_loss_and_gives_no_gradient_to_the_rest(model):
    data = batch([64])
    gradients = {}
    for weight in (0.0, 1.0):
        model.zero_grad()
        objective(model, data, LossWeights(indexer=weight), 0.3, "sparse").total.backward()
        gradients[weight] = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    for name, with_loss in gradients[1.0].items():
        if ".indexer." in name:
            assert gradients[0.0][name].abs().max() == 0 and with_loss.abs().max() > 0, name
        else:
            torch.testing.assert_close(with_loss, gradients[0.0][name], atol=0, rtol=0)


def test_every_parameter_gets_a_gradient(model):
    model.zero_grad()
    objective(model, batch([64], rows=3), LossWeights(), 0.3, "sparse").total.backward()
    assert [name for name, parameter in model.named_parameters() if not parameter.grad.abs().max() > 0] == []


@pytest.mark.parametrize("recompute_above", [10_000, 10])
def test_in_the_warm_up_nothing_but_the_indexer_gets_a_gradient_and_its_divergence_is_of_all_visible_entries(
        model, monkeypatch, recompute_above):
    monkeypatch.setattr(type(model), "recompute_above", recompute_above)
    data = batch([64])
    model.zero_grad()
    with attending(model, "warmup"):
        losses = objective(model, data, LossWeights(), 0.3, "warmup")
        losses.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad
        assert (parameter.grad is not None and parameter.grad.abs().max() > 0) == (".indexer." in name), name
    assert losses.parts["loss"] == objective(model, data, LossWeights(), 0.3, "dense").parts["loss"]
    assert losses.total.item() == pytest.approx(2 * losses.parts["indexer_loss"])  # two layers have one
    assert losses.parts["indexer_loss"] != objective(model, data, LossWeights(), 0.0, "sparse").parts["indexer_loss"]


def test_dense_attention_leaves_the_indexer_alone(model):
    model.zero_grad()
    losses = objective(model, batch([64]), LossWeights(), 0.3, "dense")
    losses.total.backward()
    assert "indexer_loss" not in losses.parts
    assert {name for name, parameter in model.named_parameters() if parameter.grad is None} == {
        name for name, _ in model.named_parameters() if ".indexer." in name}


def test_until_the_indexer_selects_inference_reads_every_visible_entry(model):
    data = batch([64])
    dense = objective(model, data, LossWeights(), 0.0, "dense").parts["loss"]
    with attending(model, "dense"), torch.no_grad():
        logits = model(data.tokens_BS, position_BS=data.positions_BS).logits
    with torch.no_grad():
        selected = model(data.tokens_BS, position_BS=data.positions_BS).logits
    assert torch.nn.functional.cross_entropy(logits[0], data.targets_BS[0]).item() == pytest.approx(dense, abs=1e-5)
    assert not torch.allclose(selected, logits)


def test_a_warm_up_without_an_indexer_is_refused():
    with pytest.raises(RecipeError, match="no layer with an indexer"):
        check_phases(random_model(small_config([0, 128])), {"dense", "warmup", "sparse"})


def test_training_the_indexer_alone_lowers_its_divergence():
    model = random_model(CONFIG)
    data = batch([200])
    indexer = [parameter for name, parameter in model.named_parameters() if ".indexer." in name]
    optimizer = torch.optim.Adam(indexer, lr=0.01)
    divergence = []
    with attending(model, "warmup"):
        for _ in range(30):
            losses = objective(model, data, LossWeights(), 0.0, "warmup")
            divergence.append(losses.parts["indexer_loss"])
            model.zero_grad()
            losses.total.backward()
            optimizer.step()
    assert divergence[-1] < 0.7 * divergence[0]


def test_router_loads_respond_to_the_bias():
    model = random_model(CONFIG)
    data = batch([64], rows=4)
    router = model.blocks[1].moe.router
    router.bias.zero_()
    fullest = []
    for _ in range(60):
        losses = objective(model, data, LossWeights(), 0.0, "sparse")
        fullest.append(move_router_biases(model, losses.observations, 0.02)["fullest_expert"])
    load = losses.observations[1].routing.load_E.float()
    assert fullest[-1] < fullest[0]
    assert load.max() / load.mean() < 1.25
    router.bias[3] += 100
    assert objective(model, data, LossWeights(), 0.0, "sparse").observations[1].routing.load_E[3] == 4 * 64


def test_recomputed_blocks_give_the_same_loss_and_gradients(model, monkeypatch):
    data = batch([40, 24])
    runs = []
    for above in (10_000, 10):
        monkeypatch.setattr(type(model), "recompute_above", above)
        losses = objective(model, data, LossWeights(), 0.3, "sparse")
        runs.append([losses.total, *torch.autograd.grad(losses.total, list(model.parameters()), allow_unused=True)])
    for expected, found in zip(*runs, strict=True):
        assert expected is found is None or torch.equal(expected, found)
