"""The shelf of experiments: one claim, one file. A new one is a file and a line here."""

from fathom.lab.experiment import Experiment
from fathom.lab.experiments import (
    attention,
    balance,
    compression,
    early_layers,
    indexer,
    mtp,
    muon,
    overlap,
    qat,
    sample_masks,
    scoring,
    streams,
)

EXPERIMENTS: dict[str, Experiment] = {module.EXPERIMENT.name: module.EXPERIMENT for module in (
    muon, attention, streams, compression, overlap, indexer, early_layers, scoring, balance, qat, mtp, sample_masks)}
