"""The indexer's selection for a few queries (report 2.3.1, eq. 15-17): keys are read once, and no score is sorted."""

import torch
from torch import Tensor

from fathom.ops.index_topk import index_topk
from fathom.ops.native.library import library, ready, runs, threads

_ROW, _QUERIES = 15, 128  # of a row, and of rows of several: with more, products of many queries with many keys are faster


def _supports(q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, first_BS: Tensor, count_BS: Tensor, k: int) -> bool:
    S = first_BS.shape[1]
    return (0 < first_BS.numel() and S <= _ROW and (S == 1 or first_BS.numel() <= _QUERIES) and runs(q_BSHD, weight_BSH, keys_BMD)
            and keys_BMD.stride()[1:] == (keys_BMD.shape[2], 1))


@index_topk.register("native", supports=_supports)
def index_topk_native(q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, first_BS: Tensor, count_BS: Tensor, k: int) -> Tensor:
    """`index_topk` for few queries; sums in float32 whatever the dtypes."""
    (B, S, H, D), M = q_BSHD.shape, keys_BMD.shape[1]
    K = min(k, M)
    q, weight, first, count = ready(q_BSHD), ready(weight_BSH), first_BS.contiguous(), count_BS.contiguous()
    turned, score, selected_BSK = torch.empty(D, 16), torch.empty(max(1, M)), torch.empty(B, S, K, dtype=torch.int64)
    library().fathom_index_topk(
        q.data_ptr(), weight.data_ptr(), keys_BMD.data_ptr(), keys_BMD.dtype is torch.bfloat16, first.data_ptr(), count.data_ptr(), B, S, H, D, K,
        keys_BMD.stride(0), turned.data_ptr(), score.data_ptr(), selected_BSK.data_ptr(), threads(M * D))
    return selected_BSK
