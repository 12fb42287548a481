"""What the indexer chooses against the best possible choice, a random one and none, in one trained model (report 2.3.1)."""

import torch
from torch import Tensor

from fathom import ops
from fathom.evals.perplexity import bits_per_byte
from fathom.lab.experiment import Experiment, Numbers, Trained, Variant, Verdict, mean, noise, swapped

_attention, _topk = ops.attention, ops.index_topk


def oracle(q_BSHD: Tensor, window: ops.Window, entries: ops.Entries | None, sink_H: Tensor) -> Tensor:
    """As `ops.attention` [B, S, H, D], over as many entries as were selected, but those that the heads would read most of all."""
    if entries is not None and entries.selected_BSK is not None:
        entries = entries._replace(selected_BSK=_most_read(q_BSHD, window, entries, sink_H))
    return _attention(q_BSHD, window, entries, sink_H)


def random_topk(q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, first_BS: Tensor, count_BS: Tensor, k: int) -> Tensor:
    """As `ops.index_topk` [B, S, K], any k visible entries; the same ones each time for the same shape."""
    generator = torch.Generator().manual_seed(keys_BMD.shape[1])
    noise_BMD = torch.rand(keys_BMD.shape[0], keys_BMD.shape[1], 1, generator=generator)
    one_BSH = torch.ones(*weight_BSH.shape[:2], 1)
    return _topk(one_BSH[..., None], one_BSH, noise_BMD, first_BS, count_BS, k)


def no_entries(q_BSHD: Tensor, weight_BSH: Tensor, keys_BMD: Tensor, first_BS: Tensor, count_BS: Tensor, k: int) -> Tensor:
    """As `ops.index_topk` [B, S, K], nothing."""
    return torch.full((*first_BS.shape, k), -1)


def _most_read(q_BSHD: Tensor, window: ops.Window, entries: ops.Entries, sink_H: Tensor) -> Tensor:
    mass_BSM = ops.entry_mass(q_BSHD, window, entries._replace(selected_BSK=None), sink_H)
    best = mass_BSM.topk(entries.selected_BSK.shape[2])
    return best.indices.masked_fill(best.values <= 0, -1)


@torch.no_grad()
def _measure(trained: Trained) -> dict[str, float]:
    caught: list[float] = []

    def noted(q_BSHD: Tensor, window: ops.Window, entries: ops.Entries | None, sink_H: Tensor) -> Tensor:
        if entries is not None and entries.selected_BSK is not None:
            mass_BSM = ops.entry_mass(q_BSHD, window, entries._replace(selected_BSK=None), sink_H)
            best_BSM = ops.attended_entries(entries._replace(selected_BSK=_most_read(q_BSHD, window, entries, sink_H)))
            chosen = entries.count_BS > entries.selected_BSK.shape[2]
            shares = [(mass_BSM * mask_BSM).sum(-1)[chosen].mean() for mask_BSM in (ops.attended_entries(entries), best_BSM)]
            caught.append(float(shares[0] / shares[1]))
        return _attention(q_BSHD, window, entries, sink_H)

    def bits(*parts: tuple[object, str, object]) -> float:
        with swapped(*parts):
            return bits_per_byte(trained.model, trained.held_out, trained.byte_lengths_V)

    found = {"bits_indexer": bits((ops, "attention", noted)), "bits_oracle": bits((ops, "attention", oracle)),
             "bits_random": bits((ops, "index_topk", random_topk)), "bits_nothing": bits((ops, "index_topk", no_entries))}
    return found | {"mass_caught": sum(caught) / max(len(caught), 1)}


def _judge(numbers: Numbers) -> Verdict:
    indexer, oracle_, random, nothing = (mean(numbers, "trained", f"bits_{name}") for name in ("indexer", "oracle", "random", "nothing"))
    gap, caught = random - oracle_, mean(numbers, "trained", "mass_caught")
    margin = noise({"gap": [{"bits": run["bits_random"] - run["bits_oracle"]} for run in numbers["trained"]]}, ("gap",))
    said = (f"bits {indexer:.4f} with the indexer, {oracle_:.4f} with the oracle, {random:.4f} at random, {nothing:.4f} without entries; it catches "
            f"{caught:.0%} of the attention that the oracle's choice gets")
    if gap <= margin:
        return Verdict("partly" if caught >= 0.9 else "not", f"{said}; which entries are read makes too little difference to tell "
                                                             f"({gap:.4f}, noise {margin:.4f})")
    closed = (random - indexer) / gap
    return Verdict("reproduced" if closed >= 0.5 else "partly" if closed > 0.1 else "not", f"{said}; {closed:.0%} of the gap closed")


EXPERIMENT = Experiment(
    "indexer", "The lightning indexer chooses the entries that matter.", "report 2.3.1",
    "Of the distance in bits per byte from a random choice to the choice of the most attended entries, the indexer closes at least half "
    "(reproduced), or a tenth (partly). Where that distance is within the noise of the seeds, at most partly: if it catches 90% of the attention.",
    (Variant("trained", ("data.validation_tokens=16384",), model={"index_topk": 8}),), _judge, _measure, metric="bits_indexer")
