"""Attention (report 2.3.1 - 2.3.3, eq. 27): for a few queries, reading the keys that they see where they lie; for many in tiles, with
gradients; and the softmax between products."""

import torch
from torch import Tensor

from fathom.ops.attention import Entries, Window, attention, attention_gradients, column_gradients, column_probabilities
from fathom.ops.native.library import library, ready, runs, threads
from fathom.ops.native.tiles import in_tiles

_ANY = (1 << 63) - 1
_COLUMNS = 1 << 17  # of which a row fits a thread's stack
_ROW, _QUERIES = 15, 128  # of a row, and of rows of several: with more, blocks of queries share what they read
_TOGETHER, _HEADS = 16, 8  # keys that are packed together, and heads that share them
_MOST = 1 << 15  # columns of a query in tiles, which lie in a thread's cache


def _supports(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> bool:
    B, S, _, D = q_BSHD.shape
    if not _few(B, S):
        return _in_tiles(q_BSHD, window, entries, sink_H)
    keys = [window.kv_BTD] if entries is None else [window.kv_BTD, entries.kv_BMD]
    return (B * S > 0 and runs(q_BSHD, sink_H, *keys) and all(x.dtype is keys[0].dtype for x in keys)
            and (entries is None or entries.kv_BMD.stride()[1:] == (D, 1)))


def _few(B: int, S: int) -> bool:
    return S <= _ROW and (S == 1 or B * S <= _QUERIES)


def _columns(window: Window, entries: Entries | None) -> int:
    """At most how many columns of scores a query has, in blocks of 16."""
    far = 0 if entries is None else entries.kv_BMD.shape[1] if entries.selected_BSK is None else entries.selected_BSK.shape[2]
    return -(-window.kv_BTD.shape[1] // _TOGETHER) * _TOGETHER + -(-far // _TOGETHER) * _TOGETHER + _TOGETHER


@attention.register("native", supports=_supports)
def attention_native(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> Tensor:
    """`attention`, whatever is selected; sums in float32 whatever the dtypes."""
    B, S, H, D = q_BSHD.shape
    if not _few(B, S):
        return _attention_of_many(q_BSHD, window, entries, sink_H)
    sink, kv_BTD = ready(sink_H), window.kv_BTD.contiguous()
    q = q_BSHD.contiguous() if q_BSHD.dtype is kv_BTD.dtype else ready(q_BSHD)
    places = [x.contiguous() for x in window[1:]]
    T, K, entry_row, kv_BMD, visible = kv_BTD.shape[1], 0, 0, None, [None, None, None]
    most = T
    if entries is not None:
        kv_BMD, entry_row = entries.kv_BMD, entries.kv_BMD.stride(0)
        visible = [None if x is None else x.contiguous() for x in entries[1:]]
        K = 0 if visible[2] is None else visible[2].shape[2]
        most += kv_BMD.shape[1] if visible[2] is None else K
    out_BSHD = torch.empty_like(q)
    library().fathom_attention(
        q.data_ptr(), q.dtype is torch.bfloat16, kv_BTD.data_ptr(), *(None if x is None else x.data_ptr() for x in (kv_BMD,)), kv_BTD.dtype is torch.bfloat16,
        *(None if x is None else x.data_ptr() for x in (*places, *visible)), sink.data_ptr(), B, S, H, D, T, K, entry_row, max(1, most),
        out_BSHD.data_ptr(), threads(B * S * H * D * most))
    return out_BSHD.to(q_BSHD.dtype)


def _in_tiles(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor, *others: Tensor) -> bool:
    """Whether the kernels for many queries take these, all of one dtype but the sinks."""
    keys = [window.kv_BTD] if entries is None else [window.kv_BTD, entries.kv_BMD]
    return (in_tiles(q_BSHD.dtype) and runs(q_BSHD, sink_H, *keys, *others) and all(x.dtype is q_BSHD.dtype for x in (*keys, *others))
            and q_BSHD.numel() > 0 and q_BSHD.shape[3] % _TOGETHER == 0 and _columns(window, entries) <= _MOST
            and (entries is None or entries.kv_BMD.stride()[1:] == (q_BSHD.shape[3], 1)))


def _of_many(q: Tensor, window: Window, entries: Entries | None, sink_H: Tensor, scores: int) -> tuple[list, list[Tensor]]:
    """What both kernels for many queries are told behind queries and gradients, and the tensors that have to live so long; `scores` rows of them a thread."""
    (B, S, H, D), T, M, K, entry_row = q.shape, window.kv_BTD.shape[1], 0, 0, 0
    read, kept = [x.contiguous() for x in window], [None] * 4
    if entries is not None:
        M, entry_row, kept = entries.kv_BMD.shape[1], entries.kv_BMD.stride(0), [entries.kv_BMD, *(None if x is None else x.contiguous() for x in entries[1:])]
        K = 0 if kept[3] is None else kept[3].shape[2]
    own, most = torch.get_num_threads(), _columns(window, entries)
    room = D * (K + 2 * _TOGETHER)
    tensors = [read[0], kept[0], read[2], read[3], read[1], *kept[1:], ready(sink_H)]
    shared = T + 2 * _TOGETHER + (M if kept[3] is None else 0)  # keys that all queries of a row read packed
    spaces = [torch.empty(D * shared, dtype=torch.int32), torch.empty(own, scores, most), torch.empty(own, room, dtype=torch.int32)]
    places = [None if x is None else x.data_ptr() for x in tensors]
    arguments = [*places[:2], q.dtype is torch.bfloat16, *places[2:], B, S, H, D, T, M, K, entry_row, most, *(x.data_ptr() for x in spaces), room]
    return arguments, [x for x in tensors if x is not None] + spaces


def _attention_of_many(q_BSHD: Tensor, window: Window, entries: Entries | None, sink_H: Tensor) -> Tensor:
    q = q_BSHD.contiguous()
    arguments, kept = _of_many(q, window, entries, sink_H, _HEADS)
    out_BSHD = torch.empty_like(q)
    library().fathom_attention_of_many(q.data_ptr(), *arguments, out_BSHD.data_ptr(), torch.get_num_threads())
    del kept
    return out_BSHD


@attention_gradients.register("native", supports=lambda q_BSHD, grad_BSHD, window, entries, sink_H: _in_tiles(q_BSHD, window, entries, sink_H, grad_BSHD))
def attention_gradients_native(q_BSHD: Tensor, grad_BSHD: Tensor, window: Window, entries: Entries | None,
                               sink_H: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """`attention_gradients` of what each query sees and nothing else, its weights made anew; the same bits with any number of threads."""
    (B, S, H, D), q, grad, own = q_BSHD.shape, q_BSHD.contiguous(), grad_BSHD.contiguous(), torch.get_num_threads()
    arguments, kept = _of_many(q, window, entries, sink_H, 3 * _HEADS)
    rows = -(-window.kv_BTD.shape[1] // _TOGETHER) * _TOGETHER + (0 if entries is None else -(-entries.kv_BMD.shape[1] // _TOGETHER) * _TOGETHER)
    q_grad, window_grad, sink_grad_BSH, sums = torch.empty_like(q), torch.zeros(window.kv_BTD.shape), torch.empty(B, S, H), torch.empty(own, rows, D)
    entries_grad = None if entries is None else torch.zeros(entries.kv_BMD.shape)
    library().fathom_attention_backward(
        q.data_ptr(), grad.data_ptr(), *arguments, sums.data_ptr(), q_grad.data_ptr(), window_grad.data_ptr(),
        None if entries_grad is None else entries_grad.data_ptr(), sink_grad_BSH.data_ptr(), own)
    del kept
    return q_grad, window_grad, entries_grad, sink_grad_BSH.sum((0, 1))


@column_probabilities.register("native", supports=lambda score_BCHJ, window, entries, sink_H, scale, dtype: (
    runs(score_BCHJ, sink_H) and 0 < score_BCHJ.shape[3] <= _COLUMNS and score_BCHJ.numel() > 0 and dtype in (score_BCHJ.dtype, torch.float32)))
def column_probabilities_native(score_BCHJ: Tensor, window: Window, entries: Entries | None, sink_H: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`column_probabilities` in one pass; in the place of the scores if it can be."""
    score, sink, places = score_BCHJ.contiguous(), ready(sink_H), [x.contiguous() for x in (window.query_place_BS, window.reach_BS, window.key_place_BT)]
    out_BCHJ = score if score.dtype is dtype else torch.empty_like(score, dtype=dtype)
    range_of, selected, K, own, far = [None, None], None, 0, False, 0
    if entries is not None:
        own = entries.kv_BMD is None
        if entries.selected_BSK is None:
            range_of = [entries.first_BS.contiguous(), entries.count_BS.contiguous()]
        else:
            selected, K = entries.selected_BSK.contiguous(), entries.selected_BSK.shape[2]
        far = _ANY if own else entries.kv_BMD.shape[1]
    library().fathom_column_probabilities(
        score.data_ptr(), score.dtype is torch.bfloat16, sink.data_ptr(), *score.shape, scale, *(x.data_ptr() for x in places), window.key_place_BT.shape[1],
        *(None if x is None else x.data_ptr() for x in (*range_of, selected)), K, own, far, out_BCHJ.data_ptr(), dtype is torch.bfloat16,
        threads(score.numel()))
    return out_BCHJ


@column_gradients.register("native", supports=lambda grad_BRJ, probability_BRJ, scale: (
    runs(grad_BRJ, probability_BRJ) and grad_BRJ.numel() > 0 and probability_BRJ.dtype is torch.float32))
def column_gradients_native(grad_BRJ: Tensor, probability_BRJ: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`column_gradients` in one pass, in the place of the gradients."""
    grad, probability, (B, R, J) = grad_BRJ.contiguous(), probability_BRJ.contiguous(), grad_BRJ.shape
    last_BR = torch.empty(B, R)
    library().fathom_column_gradients(grad.data_ptr(), grad.dtype is torch.bfloat16, probability.data_ptr(), B * R, J, scale, grad.data_ptr(),
                                      last_BR.data_ptr(), threads(grad.numel()))
    return grad, last_BR
