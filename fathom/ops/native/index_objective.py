"""The indexer's objective (report 2.3.1) between the products of a block of queries: a query's numbers stay in cache."""

import torch
from torch import Tensor

from fathom.ops.index_objective import block_divergence
from fathom.ops.native.library import library, runs, threads

_ENTRIES = 1 << 17  # of which a query's targets and scores fit a thread's stack


def _supports(probability_BRJ: Tensor, near: int, product_BCHM: Tensor, weight_BCH: Tensor, seen_BCM: Tensor, wants_grad: bool) -> bool:
    floats = probability_BRJ, product_BCHM, weight_BCH
    return (product_BCHM.numel() > 0 and runs(*floats) and all(x.dtype is torch.float32 for x in floats) and not product_BCHM.requires_grad
            and product_BCHM.is_contiguous() and product_BCHM.shape[-1] <= _ENTRIES)


@block_divergence.register("native", supports=_supports)
def block_divergence_native(probability_BRJ: Tensor, near: int, product_BCHM: Tensor, weight_BCH: Tensor, seen_BCM: Tensor,
                            wants_grad: bool) -> tuple[Tensor, ...]:
    """`block_divergence`, whose gradients of the products are written over these."""
    (B, C, H, M), (_, R, J) = product_BCHM.shape, probability_BRJ.shape
    probability, weight, seen = probability_BRJ.contiguous(), weight_BCH.contiguous(), seen_BCM.contiguous()
    divergence_BC, reads_BC, weight_grad_BCH = torch.empty(B, C), torch.empty(B, C, dtype=torch.bool), torch.empty(B, C, H)
    library().fathom_block_divergence(
        probability.data_ptr(), B * C, R // C, J, near, product_BCHM.data_ptr(), weight.data_ptr(), seen.data_ptr(), H, M, wants_grad, divergence_BC.data_ptr(),
        reads_BC.data_ptr(), weight_grad_BCH.data_ptr(), threads(product_BCHM.numel() + probability.numel()))
    return (divergence_BC, reads_BC, product_BCHM, weight_grad_BCH) if wants_grad else (divergence_BC, reads_BC)
