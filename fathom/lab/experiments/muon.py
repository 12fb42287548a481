"""Muon against AdamW for all weight matrices, AdamW at three rates (report 2.4, 4.2.2)."""

from collections.abc import Iterable

from fathom.config import ModelConfig
from fathom.lab.experiment import Experiment, Numbers, Variant, Verdict, lower, mean, swapped
from fathom.optim import muon

RATES = {"adamw": 8e-3, "adamw at a half": 4e-3, "adamw at a quarter": 2e-3}


class NoMatrices(muon.MuonOptimizer):
    """Muon with nothing to do."""

    def __init__(self, groups: list[dict], settings: muon.Muon):
        super().__init__(groups or [{"params": []}], settings)


def _all_by_adamw(named_parameters: Iterable[tuple[str, object]], config: ModelConfig) -> tuple[dict[str, int], list[str]]:
    return {}, [name for name, _ in named_parameters]


def _judge(numbers: Numbers) -> Verdict:
    return lower(numbers, "muon", min(RATES, key=lambda name: mean(numbers, name)))


EXPERIMENT = Experiment(
    "muon", "Muon converges faster than AdamW on the same tokens.", "report 2.4",
    "Held-out bits per byte after the same steps are lower with Muon than with AdamW at the best of three peak rates.",
    (Variant("muon"), *(Variant(name, (f"schedule.peak_rate={rate}", f"schedule.final_rate={rate / 20}"),
                                swap=lambda: swapped((muon, "parameter_groups", _all_by_adamw), (muon, "MuonOptimizer", NoMatrices)))
                        for name, rate in RATES.items())), _judge)
