"""The indexer's selection (report 2.3.1, eq. 15-17): scores live for eight queries at a time at most, and are never sorted."""

import torch
from torch import Tensor

from fathom.ops.index_topk import index_topk
from fathom.ops.native.library import library, ready, runs, threads
from fathom.ops.native.tiles import in_tiles

_ROW, _QUERIES = 15, 128  # of a row, and of rows of several: with more, products of many queries with many keys are faster
_TOGETHER, _KEYS = 8, 16  # queries of a thread, and keys that are packed together


def _supports(q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, first_BS: Tensor, count_BS: Tensor, k: int) -> bool:
    return (first_BS.numel() > 0 and runs(q_BSHD, weight_BSH, keys_BMD) and keys_BMD.stride()[1:] == (keys_BMD.shape[2], 1)
            and (_few(first_BS) or q_BSHD.dtype is keys_BMD.dtype and in_tiles(keys_BMD.dtype) and keys_BMD.shape[2] % 2 == 0))


def _few(first_BS: Tensor) -> bool:
    S = first_BS.shape[1]
    return S <= _ROW and (S == 1 or first_BS.numel() <= _QUERIES)


@index_topk.register("native", supports=_supports)
def index_topk_native(q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, first_BS: Tensor, count_BS: Tensor, k: int) -> Tensor:
    """`index_topk`; sums in float32 whatever the dtypes."""
    (B, S, H, D), M = q_BSHD.shape, keys_BMD.shape[1]
    K = min(k, M)
    weight, first, count, selected_BSK = ready(weight_BSH), first_BS.contiguous(), count_BS.contiguous(), torch.empty(B, S, K, dtype=torch.int64)
    if not _few(first_BS):
        q, padded, own = q_BSHD.contiguous(), -(-M // _KEYS) * _KEYS, torch.get_num_threads()
        columns, score = torch.empty(padded * D, dtype=torch.int32), torch.empty(own, _TOGETHER, padded)
        library().fathom_index_topk_of_many(
            q.data_ptr(), weight.data_ptr(), keys_BMD.data_ptr(), keys_BMD.dtype is torch.bfloat16, first.data_ptr(), count.data_ptr(), B, S, H, D, M, K,
            keys_BMD.stride(0), columns.data_ptr(), score.data_ptr(), selected_BSK.data_ptr(), own)
        return selected_BSK
    q, turned, score = ready(q_BSHD), torch.empty(D, 16), torch.empty(max(1, M))
    library().fathom_index_topk(
        q.data_ptr(), weight.data_ptr(), keys_BMD.data_ptr(), keys_BMD.dtype is torch.bfloat16, first.data_ptr(), count.data_ptr(), B, S, H, D, K,
        keys_BMD.stride(0), turned.data_ptr(), score.data_ptr(), selected_BSK.data_ptr(), threads(M * D))
    return selected_BSK
