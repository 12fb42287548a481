"""What a forward pass did, seen from outside: module hooks and a listening place at three operators, nothing in the model.

All tensors are of one text, [S, ...]: the batch axis is gone. Numbers are the model's own: what an operator was given and gave back.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from fathom import ops
from fathom.model.transformer import Transformer
from fathom.ops.dispatch import Op

_LISTENER = "observed"
_recording: ContextVar[bool] = ContextVar("fathom_explain_recording", default=False)


@dataclass
class StreamsRecord:
    """One hyper-connection: streams [S, N, W] as they come, and the coefficients pre [S, N], post [S, N], res [S, N, N]."""

    streams_SNW: Tensor
    pre_SN: Tensor
    post_SN: Tensor
    res_SNN: Tensor


@dataclass
class LayerRecord:
    """One layer. Attention is averaged over heads, but for `share_SH3`: each head's window, entries and sink, which sum to 1.

    A token sees the first `count_S` entries. `score_SM` is the indexer's, None without one; `selected_SK` (-1: none) is what it picked, None
    where every visible entry is read.
    """

    connections: list[StreamsRecord] = field(default_factory=list)  # before attention, before the experts
    window_ST: Tensor | None = None
    entry_SM: Tensor | None = None
    share_SH3: Tensor | None = None
    count_S: Tensor | None = None
    score_SM: Tensor | None = None
    selected_SK: Tensor | None = None
    affinity_SE: Tensor | None = None
    expert_SK: Tensor | None = None
    weight_SK: Tensor | None = None
    streams_SNW: Tensor | None = None  # after the layer


@dataclass
class Record:
    """A whole pass: token ids [S], layers, the weights [S, N] of the streams before the head, logits [S, V]."""

    token_S: Tensor
    layers: list[LayerRecord]
    collapse_SN: Tensor
    logits_SV: Tensor


@torch.inference_mode()
def record(model: Transformer, tokens: list[int]) -> Record:
    """Read the tokens once, as training does, and keep what happened. InputError for tokens that the model cannot take."""
    layers: list[LayerRecord] = []
    collapse: list[Tensor] = []

    def streams(args: tuple, result: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
        layers[-1].connections.append(StreamsRecord(args[0][0], *(each[0] for each in result[1:])))

    def attention(args: tuple, _: Tensor) -> None:
        _note_attention(layers[-1], *args)

    with ExitStack() as stack:
        for block in model.blocks:
            _hook(stack, block, before=lambda _: layers.append(LayerRecord()), after=_note_streams(layers))
            _hook(stack, block.moe.router, after=_note_routing(layers))
            if block.attention.indexer is not None:
                _hook(stack, block.attention.indexer, after=_note_scores(layers))
        stack.enter_context(_observed(ops.open_streams, streams))
        stack.enter_context(_observed(ops.attention, attention))
        stack.enter_context(_observed(ops.collapse_coefficients, lambda _, result: collapse.append(result[0])))
        token_BS = torch.tensor([tokens], dtype=torch.int64, device=model.embed.weight.device)
        logits_SV = model(token_BS).logits[0]
    return Record(token_BS[0], layers, collapse[0], logits_SV)


@torch.inference_mode()
def early_logits(model: Transformer, streams_SNW: Tensor) -> Tensor:
    """The head's logits [S, V] for streams of any depth: what the model would say if it stopped there."""
    return model.head(model.norm(model.collapse(streams_SNW[None])))[0]


def attention_probabilities(q_BSHD: Tensor, window: ops.Window, entries: ops.Entries | None, sink_H: Tensor) -> tuple[Tensor, Tensor]:
    """The one softmax of the first row, by hand (eq. 27): over window keys [H, S, T] and entries [H, S, M] (M = 0 without entries)."""
    distance_ST = window.query_place_BS[0][:, None] - window.key_place_BT[0]
    seen_SJ = (distance_ST >= 0) & (distance_ST <= window.reach_BS[0][:, None])
    keys_JD, T = window.kv_BTD[0], window.kv_BTD.shape[1]
    if entries is not None:
        keys_JD = torch.cat([keys_JD, entries.kv_BMD[0]])
        seen_SJ = torch.cat([seen_SJ, ops.attended_entries(entries)[0]], 1)
    score_HSJ = torch.einsum("shd,jd->hsj", ops.wide(q_BSHD[0]), ops.wide(keys_JD)) * q_BSHD.shape[-1] ** -0.5
    score_HSJ = score_HSJ.masked_fill(~seen_SJ, float("-inf"))
    sink_HS1 = ops.wide(sink_H)[:, None, None].expand(-1, score_HSJ.shape[1], 1)
    probability_HSJ = torch.cat([score_HSJ, sink_HS1], -1).softmax(-1)[..., :-1]
    return probability_HSJ[..., :T], probability_HSJ[..., T:]


def _note_attention(layer: LayerRecord, q_BSHD: Tensor, window: ops.Window, entries: ops.Entries | None, sink_H: Tensor) -> None:
    window_HST, entry_HSM = attention_probabilities(q_BSHD, window, entries, sink_H)
    window_SH, entry_SH = window_HST.sum(-1).T, entry_HSM.sum(-1).T
    layer.share_SH3 = torch.stack([window_SH, entry_SH, 1 - window_SH - entry_SH], -1)
    layer.window_ST = window_HST.mean(0)
    if entries is not None:
        layer.entry_SM, layer.count_S = entry_HSM.mean(0), entries.count_BS[0]
        layer.selected_SK = None if entries.selected_BSK is None else entries.selected_BSK[0]


def _note_streams(layers: list[LayerRecord]) -> Callable:
    def note(output: tuple) -> None:
        layers[-1].streams_SNW = output[0][0]

    return note


def _note_routing(layers: list[LayerRecord]) -> Callable:
    def note(output: tuple[Tensor, Tensor, Tensor]) -> None:
        layers[-1].affinity_SE, layers[-1].expert_SK, layers[-1].weight_SK = (each[0] for each in output)

    return note


def _note_scores(layers: list[LayerRecord]) -> Callable:
    def note(scorer: tuple[Tensor, Tensor, Tensor]) -> None:
        layers[-1].score_SM = ops.index_scores(*scorer)[0]

    return note


def _hook(stack: ExitStack, module: nn.Module, before: Callable | None = None, after: Callable | None = None) -> None:
    """Call `before(inputs)` and `after(output)` around the module's forward until the stack unwinds."""
    handles = []
    if before is not None:
        handles.append(module.register_forward_pre_hook(lambda _, inputs: before(inputs)))
    if after is not None:
        handles.append(module.register_forward_hook(lambda _, __, output: after(output)))
    for handle in handles:
        stack.callback(handle.remove)


@contextmanager
def _observed(operator: Op, note: Callable[[tuple, object], None]) -> Iterator[None]:
    """Tell `note(arguments, result)` of every call of the operator in this context; the implementation stays the one that is chosen anyway."""
    chosen = Op(operator.definition, operator.composed)
    chosen.implementations = dict(operator.implementations)

    def listen(*args: object, **kwargs: object) -> object:
        result = chosen(*args, **kwargs)
        note(args, result)
        return result

    operator.implementations[_LISTENER] = (lambda *_, **__: _recording.get(), listen)
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)
        del operator.implementations[_LISTENER]
