"""Experts: of a few pairs of token and expert whole, plain or packed, an expert's three matrices being read once; of many whole in tiles, if plain and
without gradients, else what lies between products."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fathom.ops.experts import expert_hidden, expert_hidden_gradients, routed_experts, sum_rows, swiglu_expert
from fathom.ops.linear import Layer, Matrix
from fathom.ops.native.library import ROUNDS, kind_of, known, library, places, plain, projects, reads, ready, runs, threads, trains, used
from fathom.ops.native.linear import most_rows
from fathom.ops.native.tiles import in_tiles
from fathom.ops.rounding import EXACT, Rounding

_FLOATS = (torch.float32, torch.bfloat16)
_PAIRS, _SHARE = 512, 16  # pairs, and pairs for each expert there is: above either, products of many rows are faster
_TASK, _WHOLE = 48, 16  # pairs that a thread takes through an expert at a time; W and F are multiples of the latter there


def _supports(x_NW: Tensor, expert_NK: Tensor, weight_NK: Tensor, gate_EFW: Matrix, up_EFW: Matrix, down_EWF: Matrix, limit: float,
              rounding: Rounding = EXACT) -> bool:
    E, F, W = gate_EFW.shape
    few = 0 < expert_NK.numel() <= min(_PAIRS, _SHARE * E)
    return ((*up_EFW.shape, *down_EWF.shape, x_NW.shape[1]) == (E, F, W, E, W, F, W) and expert_NK.shape == weight_NK.shape
            and known(rounding) and runs(x_NW, weight_NK) and reads(gate_EFW, up_EFW, down_EWF)
            and (few or rounding is EXACT and F % _WHOLE == W % _WHOLE == 0 and isinstance(gate_EFW, Tensor) and gate_EFW.dtype is x_NW.dtype
                 and expert_NK.numel() > 0 and in_tiles(x_NW.dtype)))


@routed_experts.register("native", supports=_supports)
def routed_experts_native(x_NW: Tensor, expert_NK: Tensor, weight_NK: Tensor, gate_EFW: Matrix, up_EFW: Matrix, down_EWF: Matrix, limit: float,
                          rounding: Rounding = EXACT) -> Tensor:
    """`routed_experts`; sums in float32 whatever the dtypes."""
    (N, K), (E, F, W), kind = expert_NK.shape, gate_EFW.shape, kind_of(gate_EFW)
    if N * K > min(_PAIRS, _SHARE * E):
        return _experts_of_many(x_NW, expert_NK, weight_NK, gate_EFW, up_EFW, down_EWF, limit)
    x, weight_NK, expert_NK, bf16 = x_NW.contiguous(), ready(weight_NK), expert_NK.contiguous(), x_NW.dtype is torch.bfloat16
    kind = kind if rounding is EXACT else kind | ROUNDS
    order_P, own_PW, hidden_PF = torch.empty(N * K, dtype=torch.int64), torch.empty(N * K, W), torch.empty(N * K, F)
    unknown = library().fathom_experts_in(
        x.data_ptr(), expert_NK.data_ptr(), weight_NK.data_ptr(), *places(gate_EFW), *places(up_EFW), kind, bf16, N, K, E, F, W, limit, order_P.data_ptr(), own_PW.data_ptr(), hidden_PF.data_ptr(), threads(F * W))
    if unknown:
        raise IndexError(f"an expert is none of the {E}: {sorted(set(expert_NK.flatten().tolist()))}")
    own_PF, part_PW, out_NW = torch.empty_like(hidden_PF), torch.empty(N * K, W), torch.empty(N, W)
    library().fathom_experts_out(
        hidden_PF.data_ptr(), expert_NK.data_ptr(), order_P.data_ptr(), *places(down_EWF), kind, bf16, N, K, F, W, own_PF.data_ptr(), part_PW.data_ptr(),
        out_NW.data_ptr(), threads(F * W))
    return out_NW


def _experts_of_many(x_NW: Tensor, expert_NK: Tensor, weight_NK: Tensor, gate_EFW: Tensor, up_EFW: Tensor, down_EWF: Tensor, limit: float) -> Tensor:
    (N, K), (E, F, W), threads = expert_NK.shape, gate_EFW.shape, torch.get_num_threads()
    x, weight, expert_P = x_NW.contiguous(), ready(weight_NK), expert_NK.flatten()
    order_P, ends_E = expert_P.argsort(stable=True), expert_P.bincount(minlength=E).cumsum(0)
    if len(ends_E) != E:
        raise IndexError(f"an expert is none of the {E}: {sorted(set(expert_P.tolist()))}")
    out_PW, tasks = x.new_empty(N * K, W), torch.empty(N * K // _TASK + E, 3, dtype=torch.int64)
    space = torch.empty(threads, _TASK * (W + F), dtype=torch.int32)
    library().fathom_experts_of_many(
        x.data_ptr(), x.dtype is torch.bfloat16, order_P.data_ptr(), K, weight.data_ptr(), ends_E.data_ptr(), gate_EFW.data_ptr(), up_EFW.data_ptr(),
        down_EWF.data_ptr(), E, W, F, limit, out_PW.data_ptr(), tasks.data_ptr(), space.data_ptr(), threads)
    back_P = torch.empty_like(order_P).scatter_(0, order_P, torch.arange(N * K))
    return sum_rows(out_PW, back_P.view(N, K))


def _one(x: Tensor, gate: Layer, up: Layer, down: Layer, limit: float) -> bool:
    if (layers := plain(gate, up, down)) is None:
        return False
    F, W = layers[0].matrix.shape
    return (x.shape[-1] == W and layers[1].matrix.shape == (F, W) and layers[2].matrix.shape == (W, F)
            and 0 < x.numel() <= most_rows(layers[0].matrix) * W and projects(x, *layers))


@swiglu_expert.register("native", supports=_one)
def swiglu_expert_native(x: Tensor, gate: Layer, up: Layer, down: Layer, limit: float) -> Tensor:
    """`swiglu_expert` for few tokens."""
    gates, ups, downs = plain(gate, up, down)
    (F, W), x = gates.matrix.shape, x.contiguous()
    out = torch.empty_like(x)
    library().fathom_swiglu_expert(x.data_ptr(), x.dtype is torch.bfloat16, *used(gates), *used(ups), *used(downs), x.numel() // W, W, F, limit,
                                   out.data_ptr(), torch.get_num_threads())
    return out


def _between(*tensors: Tensor) -> bool:
    """Whether kernels take these [..., F], all of one kind; gaps cost a copy."""
    return runs(*tensors) and tensors[0].numel() > 0 and all(x.shape == tensors[0].shape and x.dtype is tensors[0].dtype for x in tensors)


def _hides(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float, dtype: torch.dtype) -> bool:
    if torch.is_grad_enabled():
        return weight is None and gate.numel() > 0 and gate.shape == up.shape and dtype is torch.float32 and trains(gate, up)
    return _between(gate, up) and dtype in _FLOATS and (weight is None or runs(weight) and weight.shape == (*gate.shape[:-1], 1))


@expert_hidden.register("native", supports=_hides)
def expert_hidden_native(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float, dtype: torch.dtype) -> Tensor:
    """`expert_hidden` in one pass."""
    return _Hidden.apply(gate, up, limit) if torch.is_grad_enabled() else _hidden(gate, up, weight, limit, dtype)


def _hidden(gate: Tensor, up: Tensor, weight: Tensor | None, limit: float, dtype: torch.dtype) -> Tensor:
    gate, up, weight, F = gate.contiguous(), up.contiguous(), None if weight is None else ready(weight), gate.shape[-1]
    out = torch.empty_like(gate, dtype=dtype)
    library().fathom_swiglu(gate.data_ptr(), up.data_ptr(), gate.dtype is torch.bfloat16, None if weight is None else weight.data_ptr(), gate.numel() // F, F,
                            limit, out.data_ptr(), dtype is torch.bfloat16, threads(gate.numel()))
    return out


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate: Tensor, up: Tensor, limit: float) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        return _hidden(gate, up, None, limit, torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        return *_gradients(*ctx.saved_tensors, None, grad, ctx.limit)[1:3], None


@expert_hidden_gradients.register("native", supports=lambda gate_PF, up_PF, weight_P1, grad_PF, limit: (
    _between(gate_PF, up_PF, grad_PF) and runs(weight_P1)))
def expert_hidden_gradients_native(gate_PF: Tensor, up_PF: Tensor, weight_P1: Tensor, grad_PF: Tensor, limit: float) -> tuple[Tensor, ...]:
    """`expert_hidden_gradients` in one pass."""
    return _gradients(gate_PF, up_PF, ready(weight_P1), grad_PF, limit)


def _gradients(*arguments) -> tuple[Tensor, ...]:
    """As `expert_hidden_gradients`; without weights of gate and up alone [..., F]."""
    gate, up, weight, grad = (None if x is None else x.contiguous() for x in arguments[:4])
    F, wanted = gate.shape[-1], weight is not None
    made = [torch.empty_like(gate) if wanted else None, torch.empty_like(gate), torch.empty_like(gate), torch.empty(len(weight)) if wanted else None]
    library().fathom_swiglu_backward(
        gate.data_ptr(), up.data_ptr(), grad.data_ptr(), gate.dtype is torch.bfloat16, weight.data_ptr() if wanted else None, gate.numel() // F, F,
        arguments[4], *(None if x is None else x.data_ptr() for x in made), threads(gate.numel()))
    return tuple(made)


@sum_rows.register("native", supports=lambda y_PW, place_NK: runs(y_PW) and y_PW.numel() > 0)
def sum_rows_native(y_PW: Tensor, place_NK: Tensor) -> Tensor:
    """`sum_rows` without a reordered copy."""
    (N, K), W, y, place = place_NK.shape, y_PW.shape[1], y_PW.contiguous(), place_NK.contiguous()
    out_NW = torch.empty(N, W)
    library().fathom_sum_rows(y.data_ptr(), y.dtype is torch.bfloat16, place.data_ptr(), N, K, W, out_NW.data_ptr(), threads(N * K * W))
    return out_NW
