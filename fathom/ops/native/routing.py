"""Routing of a few tokens in one call, where torch makes ten."""

import torch
from torch import Tensor

from fathom.ops.native.library import library, ready, runs
from fathom.ops.routing import route

_TOKENS, _SMALL = 8, 1 << 21  # tokens, or multiplications: with more, torch's product for all of them is faster


def _supports(x_BSW: Tensor, embedding_EW: Tensor, scaling: float, bias_E: Tensor | None, chosen: int, expert_BSK: Tensor | None = None) -> bool:
    E, W = embedding_EW.shape
    given = expert_BSK is not None and expert_BSK.shape == (*x_BSW.shape[:-1], chosen) and expert_BSK.dtype is torch.int64
    return (0 < x_BSW.numel() <= max(_TOKENS * W, _SMALL // E) and x_BSW.shape[-1] == W and (given or expert_BSK is None and bias_E.shape == (E,) and 0 < chosen <= E)
            and runs(x_BSW, embedding_EW))


@route.register("native", supports=_supports)
def route_native(x_BSW: Tensor, embedding_EW: Tensor, scaling: float, bias_E: Tensor | None, chosen: int,
                 expert_BSK: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """`route` for few tokens."""
    (E, W), x, rows, ahead = embedding_EW.shape, x_BSW.contiguous(), ready(embedding_EW), x_BSW.shape[:-1]
    given, bias = expert_BSK is not None, None if bias_E is None else ready(bias_E)
    expert_BSK = expert_BSK.contiguous() if given else torch.empty(*ahead, chosen, dtype=torch.int64)
    affinity_BSE, weight_BSK = torch.empty(*ahead, E), torch.empty(*ahead, chosen)
    unknown = library().fathom_route(
        x.data_ptr(), x.dtype is torch.bfloat16, rows.data_ptr(), None if bias is None else bias.data_ptr(), given, x.numel() // W, W, E, chosen,
        scaling, affinity_BSE.data_ptr(), expert_BSK.data_ptr(), weight_BSK.data_ptr(), torch.get_num_threads())
    if unknown:
        raise IndexError(f"an expert is none of the {E}: {sorted(set(expert_BSK.flatten().tolist()))}")
    return affinity_BSE, expert_BSK, weight_BSK
