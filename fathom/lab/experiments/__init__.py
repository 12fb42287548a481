"""The shelf of experiments: one claim, one file. A new one is a file and a line here."""

from fathom.lab.experiment import Experiment
from fathom.lab.experiments import (
    attention,
    balance,
    compression,
    early_layers,
    fim,
    indexer,
    mtp,
    muon,
    overlap,
    qat,
    sample_masks,
    scoring,
    streams,
    token_splitting,
)

EXPERIMENTS: dict[str, Experiment] = {module.EXPERIMENT.name: module.EXPERIMENT for module in (
    muon, attention, streams, compression, overlap, indexer, early_layers, scoring, balance, qat, mtp, fim, sample_masks,
    token_splitting)}
