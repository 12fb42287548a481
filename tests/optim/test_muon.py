"""Muon's update against the report's equations, who is updated by what, and continuing from a saved state."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

from fathom.errors import CheckpointError, RecipeError
from fathom.optim.muon import AdamW, Muon, MuonOptimizer, Optimizer, parameter_groups

CONFIG = SimpleNamespace(num_attention_heads=4, o_groups=2, index_n_heads=3, head_dim=8, index_head_dim=6)
W, R, E, F, V = 16, 5, 3, 10, 32
HEADS, GROUPS, INDEX_HEADS = 4, 2, 3

BLOCK = {  # shape, and the number of independent matrices (0: AdamW)
    "attention_norm.weight": ((W,), 0), "moe_norm.weight": ((W,), 0),
    "attention_streams.fn": ((24, 4 * W), 1), "attention_streams.base": ((24,), 0),
    "attention_streams.scale": ((3,), 0),
    "moe_streams.fn": ((24, 4 * W), 1), "moe_streams.base": ((24,), 0), "moe_streams.scale": ((3,), 0),
    "attention.query_down.weight": ((R, W), 1), "attention.query_norm.weight": ((R,), 0),
    "attention.query_up.weight": ((HEADS * 8, R), HEADS), "attention.key_value.weight": ((8, W), 1),
    "attention.key_value_norm.weight": ((8,), 0), "attention.sink": ((HEADS,), 0),
    "attention.output_down.weight": ((GROUPS * R, HEADS * 8 // GROUPS), GROUPS),
    "attention.output_up.weight": ((W, GROUPS * R), 1),
    "moe.router.weight": ((E, W), 1), "moe.experts.gate": ((E, F, W), E), "moe.experts.up": ((E, F, W), E),
    "moe.experts.down": ((E, W, F), E), "moe.shared.gate.weight": ((F, W), 1), "moe.shared.up.weight": ((F, W), 1),
    "moe.shared.down.weight": ((W, F), 1),
}


def compressor(name: str, channels: int, ratio: int, halves: int) -> dict:
    return {f"{name}.value.weight": ((halves * channels, W), halves),
            f"{name}.gate.weight": ((halves * channels, W), halves),
            f"{name}.position_bias": ((ratio, halves * channels), 0), f"{name}.norm.weight": ((channels,), 0)}


CSA = compressor("attention.compressor", 8, 4, 2) | compressor("attention.indexer.compressor", 6, 4, 2) | {
    "attention.indexer.query_up.weight": ((INDEX_HEADS * 6, R), INDEX_HEADS),
    "attention.indexer.head_weights.weight": ((INDEX_HEADS, W), 1)}
HCA = compressor("attention.compressor", 8, 128, 1)
END = {"norm.weight": ((W,), 0), "collapse.fn": ((4, 4 * W), 1), "collapse.base": ((4,), 0),
       "collapse.scale": ((1,), 0)}
MTP = BLOCK | END | {"embed_proj.weight": ((W, W), 1), "hidden_proj.weight": ((W, W), 1),
                     "embed_norm.weight": ((W,), 0), "hidden_norm.weight": ((W,), 0)}


def under(prefix: str, part: dict) -> dict:
    return {f"{prefix}.{name}": value for name, value in part.items()}


MODEL = ({"embed.weight": ((V, W), 0), "head.weight": ((V, W), 0)} | END | under("blocks.0", BLOCK | CSA)
         | under("blocks.1", BLOCK | HCA) | under("mtp.0", MTP))


def parameters(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, (shape, _) in MODEL.items()}


def set_gradients(named: dict[str, nn.Parameter], step: int, without: set[str] = frozenset()) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for name, parameter in named.items():
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = None if name in without else gradient


def muon(*shaped: tuple[torch.Tensor, int], rate: float = 1.0, **settings) -> MuonOptimizer:
    optimizer = MuonOptimizer([{"params": [p], "blocks": blocks} for p, blocks in shaped], Muon(**settings))
    for group in optimizer.param_groups:
        group["lr"] = rate
    return optimizer


def test_every_parameter_goes_where_the_report_says():
    matrices, others = parameter_groups(parameters().items(), CONFIG)
    assert matrices == {name: blocks for name, (_, blocks) in MODEL.items() if blocks}
    assert others == [name for name, (_, blocks) in MODEL.items() if not blocks]


def test_two_steps_follow_the_equations():
    generator = torch.Generator().manual_seed(1)
    start, first, second = (torch.randn(6, 10, generator=generator, dtype=torch.float64) for _ in range(3))

    def direction(matrix):  # the exact NS limit, U V^T
        U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
        return U @ Vh

    weight, momentum = start, torch.zeros_like(start)
    for gradient in (first, second):
        momentum = 0.95 * momentum + gradient
        update = direction(0.95 * momentum + gradient) * 10**0.5 * 0.18
        weight = weight * (1 - 0.5 * 0.1) - 0.5 * update

    parameter = nn.Parameter(start.clone())
    optimizer = muon((parameter, 1), rate=0.5)
    for gradient in (first, second):
        parameter.grad = gradient
        optimizer.step()
    torch.testing.assert_close(optimizer.state[parameter]["momentum"], momentum)
    torch.testing.assert_close(parameter.data, weight, rtol=0, atol=0.03 * 0.5 * 0.18 * 10**0.5)


@pytest.mark.parametrize("shape, blocks", [((16, 16), 1), ((8, 40), 1), ((40, 8), 1), ((40, 8), 4), ((3, 10, 16), 3)])
def test_an_update_is_orthogonal_in_each_block_with_the_rms_of_adamw(shape, blocks):
    torch.manual_seed(2)
    parameter = nn.Parameter(torch.randn(shape))
    before = parameter.detach().clone()
    parameter.grad = torch.randn(shape) * 1e-4
    muon((parameter, blocks), rate=0.02, weight_decay=0.0).step()
    update_BNM = (before - parameter.detach()).reshape(blocks, -1, shape[-1])
    values = torch.linalg.svdvals(update_BNM) / (0.02 * 0.18 * max(update_BNM.shape[1:]) ** 0.5)
    assert 0.9 < values.min() and values.max() < 1.1
    rms = update_BNM.square().mean((1, 2)).sqrt() / 0.02
    torch.testing.assert_close(rms, torch.full((blocks,), 0.18), rtol=0.05, atol=0)


def test_stacking_across_parameters_changes_nothing():
    torch.manual_seed(3)
    shaped = [((8, 12), 1), ((16, 12), 2), ((3, 8, 12), 3), ((12, 8), 1)]  # the first three share the shape [8, 12]
    gradients = [torch.randn(shape) for shape, _ in shaped]
    together = [nn.Parameter(torch.ones(shape)) for shape, _ in shaped]
    for parameter, gradient in zip(together, gradients, strict=True):
        parameter.grad = gradient
    muon(*((p, blocks) for p, (_, blocks) in zip(together, shaped, strict=True))).step()
    for parameter, gradient, (shape, blocks) in zip(together, gradients, shaped, strict=True):
        pieces, parts = (tensor.reshape(blocks, -1, shape[-1]) for tensor in (parameter, gradient))
        for piece, part in zip(pieces, parts, strict=True):
            alone = nn.Parameter(torch.ones_like(part))
            alone.grad = part
            muon((alone, 1)).step()
            torch.testing.assert_close(piece, alone, rtol=1e-4, atol=1e-5)


def test_a_fused_matrix_is_not_one_matrix():
    torch.manual_seed(4)
    gradient = torch.randn(16, 12)
    whole, split = nn.Parameter(torch.zeros(16, 12)), nn.Parameter(torch.zeros(16, 12))
    whole.grad, split.grad = gradient, gradient.clone()
    muon((whole, 1), (split, 2)).step()
    assert (whole - split).abs().max() > 0.1


def test_adamw_is_torchs_with_the_reports_settings():
    named, twins = parameters(), parameters()
    optimizer = Optimizer(named.items(), CONFIG, Muon(), AdamW())
    others = parameter_groups(twins.items(), CONFIG)[1]
    twin = torch.optim.AdamW([twins[name] for name in others], lr=0.01, betas=(0.9, 0.95), eps=1e-20, weight_decay=0.1)
    for step in range(3):
        set_gradients(named, step)
        set_gradients(twins, step)
        optimizer.step(0.01)
        twin.step()
    for name in others:  # ours in one pass
        torch.testing.assert_close(named[name], twins[name], rtol=1e-6, atol=1e-7)


def test_a_zero_gradient_at_the_first_step_only_decays():
    named = parameters()
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    Optimizer(named.items(), CONFIG, Muon(), AdamW()).step(0.01)
    for name, parameter in named.items():
        torch.testing.assert_close(parameter.data, before[name] * (1 - 0.01 * 0.1))


def test_parameters_without_gradient_are_left_alone():
    named = parameters()
    without = {name for name in named if ".indexer." in name} | {"head.weight", "mtp.0.moe.experts.up"}
    optimizer = Optimizer(named.items(), CONFIG, Muon(), AdamW())
    set_gradients(named, 0)
    optimizer.step(0.01)
    state = {name: tensor.clone() for name, tensor in optimizer.state_tensors().items()}
    before = {name: parameter.detach().clone() for name, parameter in named.items()}
    set_gradients(named, 1, without)
    optimizer.step(0.01)
    for name, parameter in named.items():
        assert torch.equal(parameter, before[name]) == (name in without), name
    for name, tensor in optimizer.state_tensors().items():
        assert torch.equal(tensor, state[name]) == (name.rpartition(".")[0] in without), name


def test_zero_grad_drops_the_gradients():
    named = parameters()
    optimizer = Optimizer(named.items(), CONFIG, Muon(), AdamW())
    set_gradients(named, 0)
    optimizer.zero_grad()
    assert all(parameter.grad is None for parameter in named.values())


def test_continuing_from_saved_state_is_bit_identical_to_not_stopping():
    unbroken = parameters()
    optimizer = Optimizer(unbroken.items(), CONFIG, Muon(), AdamW())
    late = {name for name in unbroken if ".indexer." in name}  # still without any gradient when the state is saved
    for step in range(6):
        set_gradients(unbroken, step, late if step < 4 else frozenset())
        optimizer.step(0.01 / (step + 1))
        if step == 2:
            stored = save({name: tensor.clone() for name, tensor in optimizer.state_tensors().items()})
            weights = {name: parameter.detach().clone() for name, parameter in unbroken.items()}

    resumed = {name: nn.Parameter(weights[name]) for name in unbroken}
    optimizer_2 = Optimizer(resumed.items(), CONFIG, Muon(), AdamW())
    optimizer_2.load_state_tensors(load(stored))
    for step in range(3, 6):
        set_gradients(resumed, step, late if step < 4 else frozenset())
        optimizer_2.step(0.01 / (step + 1))
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    ends = optimizer.state_tensors(), optimizer_2.state_tensors()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_state_names_say_parameter_and_kind():
    names = set(Optimizer(parameters().items(), CONFIG, Muon(), AdamW()).state_tensors())
    assert {"blocks.0.moe.experts.gate.momentum", "embed.weight.exp_avg", "embed.weight.exp_avg_sq",
            "embed.weight.step"} <= names
    assert "embed.weight.momentum" not in names and "blocks.0.moe.experts.gate.step" not in names


@pytest.mark.parametrize("change, message", [
    (lambda state: state.pop("norm.weight.step"), "norm.weight.step is missing"),
    (lambda state: state.update({"extra.momentum": torch.zeros(1)}), "extra.momentum is unexpected"),
    (lambda state: state.update({"collapse.fn.momentum": torch.zeros(2, 3)}), r"shape \[2, 3\] instead of \[4, 64\]"),
    (lambda state: state.clear(), "more"),
])
def test_state_of_another_model_is_refused_and_nothing_changes(change, message):
    named = parameters()
    optimizer = Optimizer(named.items(), CONFIG, Muon(), AdamW())
    state = {name: torch.ones_like(tensor) for name, tensor in optimizer.state_tensors().items()}
    change(state)
    with pytest.raises(CheckpointError, match=message):
        optimizer.load_state_tensors(state)
    assert all(not tensor.any() for tensor in optimizer.state_tensors().values())


@pytest.mark.parametrize("settings, change", [
    (Muon, dict(momentum=1.0)), (Muon, dict(weight_decay=-0.1)), (Muon, dict(update_rms=0.0)),
    (AdamW, dict(beta1=1.5)), (AdamW, dict(beta2=-0.1)), (AdamW, dict(eps=0.0)), (AdamW, dict(weight_decay=-0.1)),
])
def test_impossible_settings_are_refused_by_name(settings, change):
    with pytest.raises(RecipeError, match=f"^{next(iter(change))} is .*; allowed: "):
        settings(**change)


def test_two_runs_give_the_same_bits():
    results = []
    for _ in range(2):
        named = parameters()
        optimizer = Optimizer(named.items(), CONFIG, Muon(), AdamW())
        for step in range(3):
            set_gradients(named, step)
            optimizer.step(0.01)
        results.append(named)
    assert all(torch.equal(results[0][name], results[1][name]) for name in MODEL)


def test_the_precision_of_the_steps_follows_the_recipe_and_the_machine(monkeypatch):
    parameter = torch.zeros(2, 2)
    assert Muon(precision="bfloat16").dtype(parameter) is torch.bfloat16
    assert Muon(precision="float32").dtype(parameter) is None
    for native, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr("fathom.ops.precision.multiplies_bfloat16", lambda device, native=native: native)
        assert Muon().dtype(parameter) is expected
    assert Muon(precision="bfloat16").dtype(parameter.double()) is None
    with pytest.raises(RecipeError, match="precision is half; allowed: auto, bfloat16, float32"):
        Muon(precision="half")


def test_parameters_of_one_shape_are_updated_alike_however_many_go_together(monkeypatch):
    """Three parameters in one call, and each in a call of its own."""
    results = []
    for together in (10_000, 1):
        monkeypatch.setattr("fathom.optim.muon.TOGETHER", together)
        generator = torch.Generator().manual_seed(0)
        parameters = [torch.nn.Parameter(torch.randn(4, 6, generator=generator)) for _ in range(3)]
        optimizer = MuonOptimizer([{"params": [parameter], "blocks": 2} for parameter in parameters], Muon(precision="float32"))
        for parameter in parameters:
            parameter.grad = torch.randn(4, 6, generator=generator)
        for group in optimizer.param_groups:
            group["lr"] = 0.1
        optimizer.step()
        results.append(torch.stack([parameter.detach() for parameter in parameters]))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)
