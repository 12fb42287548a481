"""Pre-training: a corpus, a tokenizer and a schedule become a base model (report 4).

The recipe is this file's `Pretrain`; the steps are the loop's.
"""

from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fathom.accounting import parameters
from fathom.checkpoint.released import load_model
from fathom.checkpoint.training import find_model
from fathom.config import PRESETS, ModelConfig
from fathom.data.corpora import read_documents, split_held_out
from fathom.data.packing import PackedData
from fathom.data.prepared import adopt
from fathom.data.store import TokenStore, build_store
from fathom.engine.engine import Engine
from fathom.engine.sampler import Sampling
from fathom.engine.settings import EngineSettings
from fathom.errors import RecipeError
from fathom.evals.perplexity import bits_per_byte, held_out_batches, token_byte_lengths
from fathom.model.transformer import Transformer
from fathom.optim.muon import AdamW, Matrices, Muon
from fathom.optim.schedules import Schedule
from fathom.recipe import dump
from fathom.text.tokenizer import Tokenizer
from fathom.train.loop import Loop, Stage, run_stage
from fathom.train.objective import LossWeights, objective
from fathom.train.parallel import parallelise
from fathom.train.phases import check_phases
from fathom.train.plan import Cost, Optimizers, Plan, cost, show, training_flops_per_token
from fathom.train.rank_optimizer import make_optimizer
from fathom.train.ranks import Parallel, Ranks, join
from fathom.train.run_folder import first_continues, fit_minutes, restored, resumed_recipe, start_run
from fathom.train.shares import deal, rank_rows
from fathom.train.stability import Guard, Stability
from fathom.train.tracking import Tracking

SAMPLER = EngineSettings(cache_bytes=1 << 24, running=1, prefill_chunk=256, prefix_cache=False)


@dataclass(frozen=True)
class Data:
    """What to train on: a corpus of `fathom data prepare`, or, for small ones, sources that are read at once.

    Relative sources start at the recipe's folder, `prepared` where the command runs. `tokenizer`, of sources: "train",
    "official" or a folder. Validation reads rows of `validation_length` tokens, by default the longest of the schedule's.
    """

    sources: tuple[str, ...] = ()
    prepared: str | None = None
    tokenizer: str = "train"
    held_out: float = 0.05
    piece_bytes: int = 8192
    validation_tokens: int = 32768
    validation_length: int | None = None

    def __post_init__(self):
        if bool(self.sources) == bool(self.prepared):
            raise RecipeError("give either sources (at least one file, folder or package:NAME) or prepared, a corpus's folder")
        if self.validation_length is not None and self.validation_length < 1:
            raise RecipeError(f"validation_length is {self.validation_length}; allowed: at least 1")
        if not 0 < self.held_out < 1:
            raise RecipeError(f"held_out is {self.held_out}; allowed: above 0, below 1")
        if self.piece_bytes < 1 or self.validation_tokens < 1:
            raise RecipeError("piece_bytes and validation_tokens must be at least 1")


@dataclass(frozen=True)
class Pretrain:
    """A pre-training run. `model` is a preset or a config.json; `base`, if given, is a run or model folder that this one goes on from: its
    shape, weights and tokenizer. `attention` and `kv_heads` replace its attention by a baseline's (such as
    "gqa"), to compare with. `optimizer` "adamw" moves the matrices too with AdamW, for the same purpose. `minutes`, if given,
    replaces the schedule's steps by as many as this machine does in that time, measured before the run (all counts of steps keep
    their shares).
    """

    run: str
    data: Data
    schedule: Schedule
    model: str = "tiny"
    base: str | None = None
    attention: str | None = None
    kv_heads: int | None = None
    seed: int = 0
    minutes: float | None = None
    optimizer: Matrices = "muon"
    recompute_above: int = Transformer.recompute_above  # tokens of a step from which blocks are computed anew in the backward pass
    losses: LossWeights = field(default_factory=LossWeights)
    muon: Muon = field(default_factory=Muon)
    adamw: AdamW = field(default_factory=AdamW)
    loop: Loop = field(default_factory=Loop)
    stability: Stability = field(default_factory=Stability)
    tracking: Tracking = field(default_factory=Tracking)
    plan: Plan = field(default_factory=Plan)
    parallel: Parallel = field(default_factory=Parallel)

    def __post_init__(self):
        if self.base and (self.attention or self.kv_heads):
            raise RecipeError("base brings its own attention; leave attention and kv_heads out")
        if self.parallel.shard > 1 and self.schedule.quantise_from is not None:
            raise RecipeError("schedule.quantise_from needs whole matrices on every rank; set parallel.shard = 1")
        if self.parallel.shard > 1 and self.schedule.indexer_warmup_steps:
            raise RecipeError("schedule.indexer_warmup_steps freezes what FSDP has wrapped; set parallel.shard = 1")
        if self.minutes is not None and self.minutes <= 0:
            raise RecipeError(f"minutes is {self.minutes}; allowed: above 0")


@dataclass(frozen=True)
class Corpus:
    """The prepared data of a run."""

    tokenizer: Tokenizer
    train: TokenStore
    held_out: TokenStore


def pretrain(recipe: Pretrain, root: Path, resume: bool, console: Console, device: str = "cpu") -> Path:
    """Run a recipe to its end (or continue it) on a device and return the run's folder. Raises Stopped after Ctrl-C.

    Started by torchrun, this is one of the recipe's `parallel` ranks, and all of them call it.
    """
    with join(recipe.parallel, device) as ranks:
        return _pretrain(recipe, root, resume, console, ranks)


def _pretrain(recipe: Pretrain, root: Path, resume: bool, console: Console, ranks: Ranks) -> Path:
    run, state = Path(recipe.run), None
    if resume:
        recipe = resumed_recipe(run, recipe)
        model, state = first_continues(run, ranks)
        config = model.config
    else:
        config = model_config(recipe, root)
        ranks.lead(lambda: start_run(run, recipe))
        known = Tokenizer.load(find_model(recipe.base)) if recipe.base else None
        ranks.lead(lambda: _prepare(recipe.data, config, known, run, root, console), patient=True)
        model = load_model(find_model(recipe.base)) if recipe.base else Transformer(config).initialise(recipe.seed)
        if known and known.fingerprint != Tokenizer.load(run / "tokenizer").fingerprint:
            raise RecipeError(f"{recipe.data.prepared} was made with another tokenizer than {recipe.base}'s; prepare it with tokenizer = "
                              "that model's folder")
    corpus = Corpus(Tokenizer.load(run / "tokenizer"), *(TokenStore.open(run / "data" / part, verify=resume and ranks.first)
                                                         for part in ("train", "held_out")))
    _check_vocabulary(corpus.tokenizer, config)
    model.recompute_above = recipe.recompute_above
    check_phases(model, {recipe.schedule.attention_at(first) for first, _ in recipe.schedule.segments()})
    _describe(recipe, config, corpus, console)
    if recipe.minutes and not resume:
        recipe = fit_minutes(recipe, model, lambda trial: _stage(recipe, trial, corpus, ranks), console, ranks)
    model = parallelise(model, ranks)
    optimizer = restored(make_optimizer(model, recipe.muon, recipe.adamw, ranks, recipe.optimizer), state)
    # A forward pass that holds part of a step's tokens cannot look up which experts were foreseen for them.
    guard = Guard(recipe.stability if ranks.one_pass else replace(recipe.stability, anticipate_steps=0))
    guard.load_state_tensors(state.guard if state else {})
    run_stage(run, model, corpus.tokenizer, optimizer, _stage(recipe, model, corpus, ranks), recipe.schedule.steps,
              state.step if state else 0, recipe.loop, console, guard, recipe.tracking, ranks)
    return run


def dry_run(recipe: Pretrain, root: Path, console: Console) -> Cost:
    """Print the resolved recipe and what it comes to, without data, weights or a run folder."""
    config = model_config(recipe, root)
    found = cost(config, recipe.schedule, recipe.plan, Optimizers(recipe.muon, recipe.adamw, recipe.optimizer), recipe.recompute_above)
    show(dump(recipe), config, recipe.plan, found, console)
    return found


def _stage(recipe: Pretrain, model: Transformer, corpus: Corpus, ranks: Ranks) -> Stage:
    schedule, pad_id, data = recipe.schedule, corpus.tokenizer.pad_id, recipe.data
    packed = {length: PackedData(corpus.train, length, recipe.seed, pad_id) for length in schedule.lengths}
    validation = deal(held_out_batches(corpus.held_out, data.validation_length or schedule.lengths[-1], pad_id, data.validation_tokens), ranks)
    byte_lengths_V = token_byte_lengths(corpus.tokenizer, model.config.vocab_size)
    flops = lru_cache(lambda length, attention: training_flops_per_token(model.config, length, attention, schedule.mtp_weight > 0))
    return Stage(
        batch=lambda step: rank_rows(packed[schedule.length_at(step)], schedule.first_row_at(step), schedule.batch_rows_at(step), ranks),
        loss=lambda batch, step: objective(model, batch, recipe.losses, schedule.mtp_weight_at(step), schedule.attention_at(step)),
        rate=schedule.rate_at, bias_speed=schedule.bias_speed_at, quantised=schedule.quantised_at, attention=schedule.attention_at,
        validate=lambda: bits_per_byte(model, validation, byte_lengths_V, ranks.sum),
        sample=lambda whole: continuations(whole, corpus.tokenizer, recipe.tracking),
        flops=lambda step: flops(schedule.length_at(step), schedule.attention_at(step)),
        peak_flops=None if ranks.device.type == "cpu" else ranks.count * recipe.plan.peak_flops)


def continuations(model: Transformer, tokenizer: Tokenizer, tracking: Tracking) -> list[dict[str, str]]:
    """How the model greedily continues each of the run's prompts."""
    engine = Engine(model, tokenizer, settings=SAMPLER)
    sampling = Sampling(temperature=0, max_tokens=tracking.sample_tokens)
    try:
        return [{"prompt": prompt, "text": "".join(engine.text(prompt, sampling))} for prompt in tracking.prompts]
    finally:
        engine.close()


def model_config(recipe: Pretrain, root: Path) -> ModelConfig:
    """The config of the model that a recipe trains."""
    if recipe.base:
        return ModelConfig.load(find_model(recipe.base) / "config.json")
    config = ModelConfig.preset(recipe.model) if recipe.model in PRESETS else ModelConfig.load(root / recipe.model)
    changes = {"attention": recipe.attention, "num_key_value_heads": recipe.kv_heads}
    return ModelConfig.from_dict(config.to_dict() | {name: value for name, value in changes.items() if value is not None})


def _prepare(data: Data, config: ModelConfig, known: Tokenizer | None, run: Path, root: Path, console: Console) -> None:
    """Write the run's tokenizer and token stores, or take a prepared corpus's."""
    if data.prepared:
        adopt(Path(data.prepared), run)
        return
    console.print(f"reading {', '.join(data.sources)}", soft_wrap=True)
    train, held_out = split_held_out(read_documents(data.sources, root), data.held_out, data.piece_bytes)
    if known is not None:
        tokenizer = known
    elif data.tokenizer == "train":
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
    console.print(f"model {recipe.base or recipe.model}: {counts.total / 1e6:.2f}M parameters, {counts.activated / 1e6:.2f}M activated "
                  f"(and {counts.mtp / 1e6:.2f}M for MTP)", soft_wrap=True)
