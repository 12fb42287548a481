"""Pre-training: a corpus, a tokenizer and a schedule become a base model (report 4).

The recipe is this file's `Pretrain`; the steps are the loop's.
"""

from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fathom.accounting import parameters
from fathom.config import PRESETS, ModelConfig
from fathom.data.corpora import read_documents, split_held_out
from fathom.data.packing import PackedData
from fathom.data.store import TokenStore, build_store
from fathom.errors import RecipeError
from fathom.evals.perplexity import bits_per_byte, held_out_batches, token_byte_lengths
from fathom.model.transformer import Transformer
from fathom.optim.muon import AdamW, Muon
from fathom.optim.schedules import Schedule
from fathom.text.tokenizer import Tokenizer
from fathom.train.loop import Loop, Stage, run_stage
from fathom.train.objective import LossWeights, objective
from fathom.train.parallel import parallelise
from fathom.train.rank_optimizer import make_optimizer
from fathom.train.ranks import Parallel, Ranks, join
from fathom.train.run_folder import continue_run, fit_minutes, resumed_recipe, restored, start_run
from fathom.train.shares import deal, rank_rows


@dataclass(frozen=True)
class Data:
    """What to train on; relative sources start at the recipe's folder. `tokenizer`: "train", "official" or a folder."""

    sources: tuple[str, ...]
    tokenizer: str = "train"
    held_out: float = 0.05
    piece_bytes: int = 8192
    validation_tokens: int = 32768

    def __post_init__(self):
        if not self.sources:
            raise RecipeError("sources is empty; name at least one file, folder or package:NAME")
        if not 0 < self.held_out < 1:
            raise RecipeError(f"held_out is {self.held_out}; allowed: above 0, below 1")
        if self.piece_bytes < 1 or self.validation_tokens < 1:
            raise RecipeError("piece_bytes and validation_tokens must be at least 1")


@dataclass(frozen=True)
class Pretrain:
    """A pre-training run. `model` is a preset or a config.json; `minutes`, if given, replaces the schedule's steps by
    as many as this machine does in that time, measured before the run (warm-up and decay keep their shares).
    """

    run: str
    data: Data
    schedule: Schedule
    model: str = "tiny"
    seed: int = 0
    minutes: float | None = None
    dense_steps: int = 0  # of attention to all visible entries, before the indexer selects
    losses: LossWeights = field(default_factory=LossWeights)
    muon: Muon = field(default_factory=Muon)
    adamw: AdamW = field(default_factory=AdamW)
    loop: Loop = field(default_factory=Loop)
    parallel: Parallel = field(default_factory=Parallel)

    def __post_init__(self):
        if self.parallel.shard > 1 and self.schedule.quantise_from is not None:
            raise RecipeError("schedule.quantise_from needs whole matrices on every rank; set parallel.shard = 1")
        if self.minutes is not None and self.minutes <= 0:
            raise RecipeError(f"minutes is {self.minutes}; allowed: above 0")
        if self.dense_steps < 0:
            raise RecipeError(f"dense_steps is {self.dense_steps}; allowed: at least 0")


@dataclass(frozen=True)
class Corpus:
    """The prepared data of a run."""

    tokenizer: Tokenizer
    train: TokenStore
    held_out: TokenStore


def pretrain(recipe: Pretrain, root: Path, resume: bool, console: Console) -> Path:
    """Run a recipe to its end (or continue it) and return the run's folder. Raises Stopped after Ctrl-C.

    Started by torchrun, this is one of the recipe's `parallel` ranks, and all of them call it.
    """
    with join(recipe.parallel) as ranks:
        return _pretrain(recipe, root, resume, console, ranks)


def _pretrain(recipe: Pretrain, root: Path, resume: bool, console: Console, ranks: Ranks) -> Path:
    run = Path(recipe.run)
    config = _config(recipe.model, root)
    state = None
    if resume:
        recipe = resumed_recipe(run, recipe)
        loaded = []
        ranks.lead(lambda: loaded.append(continue_run(run)))  # first alone: what is wrong with a checkpoint is said once
        model, state = loaded[0] if loaded else continue_run(run)
        config = model.config
    else:
        ranks.lead(lambda: start_run(run, recipe))
        ranks.lead(lambda: _prepare(recipe.data, config, run, root, console), patient=True)
        model = Transformer(config).initialise(recipe.seed)
    corpus = Corpus(Tokenizer.load(run / "tokenizer"), *(TokenStore.open(run / "data" / part, verify=resume and ranks.first)
                                                         for part in ("train", "held_out")))
    _check_vocabulary(corpus.tokenizer, config)
    _describe(recipe, config, corpus, console)
    if recipe.minutes and not resume:
        recipe = fit_minutes(recipe, model, lambda trial: _stage(recipe, trial, corpus, ranks), console, ranks)
    model = parallelise(model, ranks)
    optimizer = restored(make_optimizer(model, recipe.muon, recipe.adamw, ranks), state)
    run_stage(run, model, corpus.tokenizer, optimizer, _stage(recipe, model, corpus, ranks), recipe.schedule.steps,
              state.step if state else 0, recipe.loop, console, ranks)
    return run


def _stage(recipe: Pretrain, model: Transformer, corpus: Corpus, ranks: Ranks) -> Stage:
    schedule, pad_id = recipe.schedule, corpus.tokenizer.pad_id
    packed = {length: PackedData(corpus.train, length, recipe.seed, pad_id) for length in schedule.lengths}
    validation = deal(held_out_batches(corpus.held_out, schedule.lengths[-1], pad_id, recipe.data.validation_tokens), ranks)
    byte_lengths_V = token_byte_lengths(corpus.tokenizer, model.config.vocab_size).to(ranks.device)
    return Stage(
        batch=lambda step: rank_rows(packed[schedule.length_at(step)], schedule.first_row_at(step), schedule.batch_rows_at(step), ranks),
        loss=lambda batch, step: objective(model, batch, recipe.losses, schedule.mtp_weight_at(step),
                                           "dense" if step < recipe.dense_steps else "sparse"),
        rate=schedule.rate_at, bias_speed=schedule.bias_speed_at, quantised=schedule.quantised_at,
        validate=lambda: bits_per_byte(model, validation, byte_lengths_V, ranks.sum))


def _config(model: str, root: Path) -> ModelConfig:
    return ModelConfig.preset(model) if model in PRESETS else ModelConfig.load(root / model)


def _prepare(data: Data, config: ModelConfig, run: Path, root: Path, console: Console) -> None:
    """Write the run's tokenizer and token stores."""
    console.print(f"reading {', '.join(data.sources)}", soft_wrap=True)
    train, held_out = split_held_out(read_documents(data.sources, root), data.held_out, data.piece_bytes)
    if data.tokenizer == "train":
        console.print(f"training a tokenizer of {config.vocab_size} tokens on "
                      f"{sum(len(document.text) for document in train) / 1e6:.1f}M characters", soft_wrap=True)
        tokenizer = Tokenizer.train((document.text for document in train), config.vocab_size)
    else:
        tokenizer = Tokenizer.official() if data.tokenizer == "official" else Tokenizer.load(root / data.tokenizer)
    _check_vocabulary(tokenizer, config)
    (run / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(run / "tokenizer")
    total = sum(len(document.text.encode()) for document in [*train, *held_out])
    with Progress(TextColumn("tokenising"), BarColumn(bar_width=24), TimeRemainingColumn(), console=console,
                  disable=not console.is_terminal) as progress:
        task = progress.add_task("tokenising", total=total)
        for part, documents in (("train", train), ("held_out", held_out)):
            build_store(run / "data" / part, documents, tokenizer.encode_many, bos_id=tokenizer.bos_id, eos_id=tokenizer.eos_id,
                        vocab_size=tokenizer.vocab_size, fingerprint=tokenizer.fingerprint,
                        progress=lambda done: progress.update(task, completed=done))


def _check_vocabulary(tokenizer: Tokenizer, config: ModelConfig) -> None:
    if tokenizer.vocab_size > config.vocab_size:
        raise RecipeError(f"the tokenizer has {tokenizer.vocab_size} tokens, the model's vocab_size is "
                          f"{config.vocab_size}; use a config with the larger one")


def _describe(recipe: Pretrain, config: ModelConfig, corpus: Corpus, console: Console) -> None:
    counts = parameters(config)
    for part, store in (("train on", corpus.train), ("held out", corpus.held_out)):
        console.print(f"{part} {store.total_tokens:,} tokens of {store.manifest['bytes'] / 1e6:.2f} MB in "
                      f"{store.manifest['documents']:,} documents", soft_wrap=True)
    console.print(f"model {recipe.model}: {counts.total / 1e6:.2f}M parameters, {counts.activated / 1e6:.2f}M activated "
                  f"(and {counts.mtp / 1e6:.2f}M for MTP)", soft_wrap=True)
