"""The whole model, in the order of the report: embed, copy to streams, blocks, collapse, norm, head.

It knows one batch and its cache; nothing of files, optimisers, requests or devices other than its own.
"""

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fathom import ops
from fathom.config import ModelConfig
from fathom.errors import InputError
from fathom.model.attention import Phase
from fathom.model.block import Block, Observation
from fathom.model.cache import Cache
from fathom.model.hyper_connections import HyperConnection, StreamCollapse
from fathom.model.layers import Linear, RMSNorm
from fathom.model.layout import Layout
from fathom.model.moe import Router, balanced_table
from fathom.model.mtp import MTPBlock


class Output(NamedTuple):
    """Logits [B, S, V] in float32, and the streams [B, S, N, W] of all new tokens, from which an MTP block goes on."""

    logits: Tensor
    streams: Tensor


class Features(NamedTuple):
    """What training reads: the head's inputs [B, S, W] for the next token and for each MTP depth, and observations."""

    hidden_BSW: Tensor
    mtp_hidden: list[Tensor]
    observations: list[Observation]


class Transformer(nn.Module):
    """A DeepSeek-V4 language model. Made with unset weights: call `initialise`, or load a checkpoint.

    A training step of more tokens than `recompute_above` keeps only the streams between blocks and computes each block anew in the
    backward pass: half of the memory for a third more time.
    """

    recompute_above = 8192

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.hidden_size, _weight=torch.empty(
            config.vocab_size, config.hidden_size))
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.collapse = StreamCollapse(config)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.head = Linear(config.hidden_size, config.vocab_size, wide=True)
        self.mtp = nn.ModuleList(MTPBlock(config, depth) for depth in range(config.num_nextn_predict_layers))

    def forward(self, input_ids: Tensor, *, position_BS: Tensor | None = None, cache: Cache | None = None,
                count_B: Tensor | None = None, last_only: bool = False, layout: Layout | None = None) -> Output:
        """Logits [B, S, V] for token ids [B, S].

        `position_BS` restarts at 0 where a packed document starts. `cache` continues the rows it holds, without
        gradients; row b then has count_B[b] new tokens (all S by default), the rest is padding. `last_only`: logits
        [B, 1, V] of each row's last new token. `layout`: theirs where it is made already; ids are not looked at then. Raises InputError
        for ids outside the vocabulary, empty input and rows that get too long.
        """
        with torch.inference_mode() if cache is not None else nullcontext():
            layout = layout or self._layout(input_ids, position_BS, cache, count_B)
            X_BSNW, _ = self._trunk(input_ids, layout, cache, None)
            if cache is not None:
                cache.advance(layout.count_B)
            read_BSNW = _last(X_BSNW, layout.count_B) if last_only else X_BSNW
            return Output(self.head(self.norm(self.collapse(read_BSNW))), X_BSNW)

    @torch.inference_mode()
    def draft(self, streams_BSNW: Tensor, next_BS: Tensor, cache: Cache, count_B: Tensor) -> Output:
        """Logits [B, 1, V] of the token after the last of `next_BS`, from the first MTP block.

        `streams_BSNW` are those of the tokens before `next_BS`: the trunk's or, to draft further, those of the last draft
        (in `Output.streams`). `cache` holds the MTP block's layer, at the length before these tokens.
        """
        layout = self._layout(next_BS, None, cache, count_B)
        embed, head = self.mtp_ends(0)
        hidden_BSW, X_BSNW, _ = self.mtp[0].predict(streams_BSNW, embed(next_BS), next_BS, layout, None, cache.layers[0])
        return Output(head(_last(hidden_BSW, count_B)), X_BSNW)

    def mtp_logits(self, input_ids: Tensor, position_BS: Tensor | None = None) -> Tensor:
        """Logits [B, S - 1, V] of the first MTP block: position t sees token t + 1 and predicts token t + 2."""
        if not self.mtp:
            raise InputError("this model has no MTP block (num_nextn_predict_layers is 0)")
        layout = self._layout(input_ids, position_BS, None, None)
        if input_ids.shape[1] < 2:
            raise InputError("MTP logits need at least 2 tokens")
        X_BSNW, _ = self._trunk(input_ids, layout, None, None)
        next_BS = input_ids[:, 1:]
        layout = Layout(self.config, layout.position_BS[:, :-1], layout.count_B - 1, None)
        embed, head = self.mtp_ends(0)
        return head(self.mtp[0].predict(X_BSNW[:, :-1], embed(next_BS), next_BS, layout, None)[0])

    def features(self, token_BS: Tensor, position_BS: Tensor, next_tokens: list[Tensor], phase: Phase,
                 layout: Layout | None = None, cache: Cache | None = None) -> Features:
        """A training forward. `next_tokens`: for each MTP depth in use, the ids [B, S] that it sees beside the streams.

        Tokens that are a part of longer rows come with the `layout` of that part and a `cache`, one layer for each block and MTP
        block, that brings what lies outside of it.
        """
        layout = layout or self._layout(token_BS, position_BS, None, None)
        X_BSNW, observations = self._trunk(token_BS, layout, cache, phase)
        hidden_BSW, mtp_hidden = self.norm(self.collapse(X_BSNW)), []
        for depth, (block, next_BS) in enumerate(zip(self.mtp, next_tokens, strict=False)):
            embed, _ = self.mtp_ends(depth)
            depth_hidden_BSW, X_BSNW, observation = block.predict(
                X_BSNW, embed(next_BS), next_BS, layout, phase, cache and cache.layers[len(self.blocks) + depth])
            mtp_hidden.append(depth_hidden_BSW)
            observations.append(observation)
        return Features(hidden_BSW, mtp_hidden, observations)

    def mtp_ends(self, depth: int) -> tuple[nn.Embedding, Linear]:
        """Embedding and head of an MTP block: its own where it has them, else the model's."""
        block = self.mtp[depth]
        return block.embed or self.embed, block.head or self.head

    def new_cache(self, batch_size: int, max_tokens: int, quantized: bool = False) -> Cache:
        """An empty cache for `batch_size` rows of up to `max_tokens` tokens, on the model's device and in its dtype.

        `quantized`: entries and index keys in the released formats, which a model that rounds like the release can use
        (load_model(..., simulate_quantization=True)); InputError for another one.
        """
        if quantized and self.blocks[0].attention.rounding is ops.EXACT:
            raise InputError("a quantized cache needs a model that rounds like the release; load it with "
                             "simulate_quantization=True")
        weight = self.embed.weight
        return Cache(self.config, batch_size, max_tokens, weight.dtype, weight.device, quantized)

    def _trunk(self, token_BS: Tensor, layout: Layout, cache: Cache | None,
               phase: Phase) -> tuple[Tensor, list[Observation]]:
        X_BSNW = self.embed(token_BS)[:, :, None].expand(-1, -1, self.config.hc_mult, -1)
        observations = []
        recompute = phase is not None and torch.is_grad_enabled() and token_BS.numel() > self.recompute_above
        for layer, block in enumerate(self.blocks):
            arguments = X_BSNW, token_BS, layout, cache and cache.layers[layer], phase
            X_BSNW, observation = checkpoint(block, *arguments, use_reentrant=False) if recompute else block(*arguments)
            observations.append(observation)
        return X_BSNW, observations

    def _layout(self, token_BS: Tensor, position_BS: Tensor | None, cache: Cache | None,
                count_B: Tensor | None) -> Layout:
        if token_BS.dim() != 2 or token_BS.numel() == 0:
            raise InputError(f"token ids must be a non-empty [batch, tokens] tensor, not {list(token_BS.shape)}")
        low, high = (int(bound) for bound in token_BS.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            raise InputError(f"token id {low if low < 0 else high} is outside the vocabulary of "
                             f"{self.config.vocab_size} ids")
        B, S = token_BS.shape
        if count_B is None:
            count_B = torch.full((B,), S, dtype=torch.int64, device=token_BS.device)
        longest, limit = S, self.config.max_position_embeddings
        if cache is not None:
            if position_BS is not None or len(cache.length_B) != B:
                raise InputError(f"a cache of {len(cache.length_B)} rows takes {len(cache.length_B)} rows of new tokens "
                                 f"and no positions; got {B} rows")
            longest, limit = int((cache.length_B + count_B).max()), cache.max_tokens
        if longest > limit:
            raise InputError(f"a sequence of {longest} tokens is longer than the "
                             f"{'cache' if cache is not None else 'model (max_position_embeddings)'} holds, {limit}")
        if position_BS is None:
            start_B1 = 0 if cache is None else cache.length_B[:, None]
            position_BS = (start_B1 + torch.arange(S, device=token_BS.device)).expand(B, S)
        return Layout(self.config, position_BS, count_B, cache)

    @torch.no_grad()
    def initialise(self, seed: int) -> "Transformer":
        """Set all weights, in order, from one seed; matrices are normal with initializer_range.

        Streams start as an ordinary residual: every stream takes the whole output (post = 1), keeps to itself
        (res near the identity) and each sublayer reads mostly one of them, a different one in turn. The report gives no
        static biases; docs/model.md has the measurement behind this choice.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            leaf = name.rsplit(".", 1)[-1]
            if name.endswith("norm.weight"):
                parameter.fill_(1)
            elif leaf in ("sink", "position_bias", "base", "bias"):
                parameter.zero_()
            elif leaf == "scale":
                parameter.fill_(0.01)  # mHC paper, table 5
            else:
                parameter.copy_(torch.empty(parameter.shape).normal_(0, self.config.initializer_range,
                                                                     generator=generator))
        connections = [module for module in self.modules() if isinstance(module, HyperConnection)]
        for index, connection in enumerate(connections):
            _start_as_residual(connection, index % self.config.hc_mult, self.config.hc_mult)
        for module in self.modules():
            if isinstance(module, StreamCollapse):
                module.base.fill_(-math.log(max(self.config.hc_mult - 1, 1)))  # the mean of the streams
            elif isinstance(module, Router) and module.by_hash:
                module.table.copy_(balanced_table(*self._table_shape(), generator))
            elif isinstance(module, Router):
                module.bias.zero_()
        return self

    def _table_shape(self) -> tuple[int, int, int]:
        return self.config.vocab_size, self.config.n_routed_experts, self.config.num_experts_per_tok


def _last(x: Tensor, count_B: Tensor) -> Tensor:
    """Of x [B, S, ...] each row's last new token [B, 1, ...]."""
    last_B = (count_B - 1).clamp(min=0)
    return x[torch.arange(len(last_B), device=last_B.device), last_B][:, None]


def _start_as_residual(connection: HyperConnection, own: int, streams: int) -> None:
    pre_N, _, res_NN = connection.base.split([streams, streams, streams * streams])
    if streams > 1:
        pre_N.fill_(-2.0)
        pre_N[own] = 2.0
        res_NN.view(streams, streams).fill_diagonal_(6.0)
