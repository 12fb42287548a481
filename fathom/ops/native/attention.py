"""Attention for a few queries (report 2.3.1 - 2.3.3, eq. 27): the keys that a query sees are read where they lie, and no others."""

import torch
from torch import Tensor

from fathom.ops.attention import Entries, Window, attention
from fathom.ops.native.library import library, ready, runs, threads

_ROW, _QUERIES = 15, 128  # of a row, and of all: with more, blocks of queries share what they read


def _supports(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> bool:
    B, S, _, D = q_BSHD.shape
    keys = [window.kv_BTD] if entries is None else [window.kv_BTD, entries.kv_BMD]
    return (S <= _ROW and 0 < B * S <= _QUERIES and runs(q_BSHD, sink_H, *keys) and all(x.dtype is keys[0].dtype for x in keys)
            and (entries is None or entries.kv_BMD.stride()[1:] == (D, 1)))


@attention.register("native", supports=_supports)
def attention_native(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> Tensor:
    """`attention` for few queries, whatever they select; sums in float32 whatever the dtypes."""
    B, S, H, D = q_BSHD.shape
    q, sink, kv_BTD = ready(q_BSHD), ready(sink_H), window.kv_BTD.contiguous()
    places = [x.contiguous() for x in window[1:]]
    T, K, entry_row, kv_BMD, visible = kv_BTD.shape[1], 0, 0, None, [None, None, None]
    most = T
    if entries is not None:
        kv_BMD, entry_row = entries.kv_BMD, entries.kv_BMD.stride(0)
        visible = [None if x is None else x.contiguous() for x in entries[1:]]
        K = 0 if visible[2] is None else visible[2].shape[2]
        most += kv_BMD.shape[1] if visible[2] is None else K
    out_BSHD = torch.empty(B, S, H, D)
    library().fathom_attention(
        q.data_ptr(), kv_BTD.data_ptr(), *(None if x is None else x.data_ptr() for x in (kv_BMD,)), kv_BTD.dtype is torch.bfloat16,
        *(None if x is None else x.data_ptr() for x in (*places, *visible)), sink.data_ptr(), B, S, H, D, T, K, entry_row, max(1, most),
        out_BSHD.data_ptr(), threads(B * S * H * D * most))
    return out_BSHD.to(q_BSHD.dtype)
