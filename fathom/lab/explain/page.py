"""A record as one self-contained HTML file: numbers as JSON, beside the page's own style and scripts."""

import json
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from fathom.config import ModelConfig
from fathom.lab.explain.record import LayerRecord, Record, StreamsRecord, early_logits
from fathom.model.transformer import Transformer
from fathom.text.tokenizer import Tokenizer

MOST_NUMBERS = 600_000  # about 4 MB; of longer stories only the last tokens are told
TOP, EARLY = 10, 3  # tokens shown of the final distribution, and of each layer's
SCRIPTS = ("draw.js", "panels.js", "explain.js")


@dataclass(frozen=True)
class Subject:
    """Which model the page is about."""

    name: str
    trained: bool


def page(model: Transformer, tokenizer: Tokenizer, seen: Record, subject: Subject) -> str:
    """The HTML text."""
    folder = files("fathom.lab.explain") / "web"
    story = json.dumps(tell(model, tokenizer, seen, subject), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    html = (folder / "page.html").read_text(encoding="utf-8")
    html = html.replace("/*style*/", (folder / "explain.css").read_text(encoding="utf-8"))
    scripts = "\n".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    return html.replace("/*scripts*/", scripts).replace("/*story*/", story.replace("<", "\\u003c"))


@torch.inference_mode()
def tell(model: Transformer, tokenizer: Tokenizer, seen: Record, subject: Subject) -> dict[str, Any]:
    """All that the page shows, in plain lists; floats to four digits. Journeys of the tokens from `first` on."""
    config, tokens = model.config, seen.token_S.tolist()
    first = max(0, len(tokens) - max(1, MOST_NUMBERS // _numbers_a_token(seen, config.sliding_window)))
    layers = [_layer(config, number, model.blocks[number].moe.router, layer, first) for number, layer in enumerate(seen.layers)]
    for told, layer in zip(layers, seen.layers, strict=True):
        told["early"] = _best(early_logits(model, layer.streams_SNW).softmax(-1)[first:], EARLY)
    probability_SV = seen.logits_SV.softmax(-1)[first:]
    following = seen.token_S[first + 1:]
    chosen = probability_SV[:-1].gather(1, following[:, None])
    shown = {id for top in [*(told["early"] for told in layers), _best(probability_SV, TOP)] for row in top for id, _ in row} | set(tokens)
    return {
        "name": subject.name, "trained": subject.trained, "config": config.to_dict(), "first": first, "tokens": tokens,
        "texts": {id: _text(tokenizer, id) for id in sorted(shown)},
        "layers": layers, "collapse": _plain(seen.collapse_SN[first:]), "top": _best(probability_SV, TOP),
        "next": [[_round(p), rank] for p, rank in zip(chosen[:, 0].tolist(), ((probability_SV[:-1] > chosen).sum(-1) + 1).tolist(), strict=True)],
    }


def _layer(config: ModelConfig, number: int, router: Any, layer: LayerRecord, first: int) -> dict[str, Any]:
    """One layer; lists by token from `first` on. Attention to the window is listed from its oldest token to the token itself."""
    told: dict[str, Any] = {
        "kind": config.kind(number), "ratio": config.ratio(number), "hash": config.routes_by_hash(number),
        "connections": [_connection(each, first) for each in layer.connections],
        "after": _plain(_rms(layer.streams_SNW)[first:]), "share": _plain(layer.share_SH3[first:]),
        "window": [_plain(row[max(0, place + 1 - config.sliding_window):place + 1])
                   for place, row in enumerate(layer.window_ST) if place >= first],
        "affinity": _plain(layer.affinity_SE[first:]), "experts": layer.expert_SK[first:].tolist(), "weights": _plain(layer.weight_SK[first:]),
        "bias": None if router.by_hash else _plain(router.bias),
    }
    if layer.count_S is not None:
        counts = layer.count_S.tolist()
        seen = [(place, count) for place, count in enumerate(counts) if place >= first]
        told["entries"] = [_plain(layer.entry_SM[place, :count]) for place, count in seen]
        if layer.score_SM is not None:
            told["scores"] = [_plain(layer.score_SM[place, :count]) for place, count in seen]
            told["picked"] = [list(range(count)) if layer.selected_SK is None else [slot for slot in layer.selected_SK[place].tolist() if slot >= 0]
                              for place, count in seen]
    return told


def _connection(seen: StreamsRecord, first: int) -> dict[str, Any]:
    return {"rms": _plain(_rms(seen.streams_SNW)[first:]), "pre": _plain(seen.pre_SN[first:]), "post": _plain(seen.post_SN[first:]),
            "res": _plain(seen.res_SNN[first:])}


def _rms(streams_SNW: Tensor) -> Tensor:
    return streams_SNW.float().square().mean(-1).sqrt()


def _best(probability_SV: Tensor, count: int) -> list[list[list]]:
    """The `count` likeliest tokens of each row: [id, probability]."""
    values, ids = probability_SV.topk(min(count, probability_SV.shape[-1]))
    return [[[id, _round(p)] for id, p in zip(*row, strict=True)] for row in zip(ids.tolist(), values.tolist(), strict=True)]


def _numbers_a_token(seen: Record, window: int) -> int:
    """How many numbers tell one token's journey."""
    N = seen.collapse_SN.shape[-1]
    return TOP + sum(2 * (3 * N + N * N) + 3 * layer.share_SH3.shape[1] + min(window, layer.window_ST.shape[1]) + layer.affinity_SE.shape[1]
                     + 2 * (0 if layer.entry_SM is None else layer.entry_SM.shape[1]) for layer in seen.layers)


def _plain(values: Tensor) -> list:
    return _rounded(values.tolist())


def _rounded(value: list | float) -> list | float:
    return [_rounded(each) for each in value] if isinstance(value, list) else _round(value)


def _round(value: float) -> float:
    return float(f"{value:.4g}")


def _text(tokenizer: Tokenizer, id: int) -> str:
    """A token's characters; ids beyond the tokenizer's, which only an untrained model proposes, have none."""
    return tokenizer.decode([id]) if id < tokenizer.vocab_size else f"(id {id})"
