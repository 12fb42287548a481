"""Supervised fine-tuning: a base model learns to answer in the chat format (report 5.1.1).

Only the assistant's tokens are learned, every turn encoded exactly as the model will meet it when it is asked: turns that only add
to what was read before share an example, others (reasoning of earlier turns is dropped) get one of their own.
"""

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from torch import Tensor

from fathom.align.environments.base import EFFORTS, SEEDS, Environment
from fathom.align.rollout import environments_named
from fathom.align.tuning import Tune, tuning_optimizer
from fathom.data.packing import Batch, PackedData
from fathom.data.questions import make_pairs, to_messages
from fathom.data.transforms import Example, masked_example, pack_examples
from fathom.errors import DataError, RecipeError
from fathom.evals.perplexity import bits_per_byte, token_byte_lengths
from fathom.model.transformer import Transformer
from fathom.optim.lora import Lora
from fathom.optim.muon import AdamW, Muon
from fathom.optim.schedules import Schedule
from fathom.text import chat
from fathom.text.tokenizer import Tokenizer
from fathom.train.loop import Loop, Stage, run_stage
from fathom.train.objective import LossWeights, objective
from fathom.train.parallel import parallelise
from fathom.train.rank_optimizer import make_optimizer
from fathom.train.ranks import Parallel, Ranks, join
from fathom.train.run_folder import fit_minutes, restored, tuned_run
from fathom.train.shares import deal, rank_rows

HELD_OUT_QUESTIONS = 200
VALIDATION_ROWS = 16


class Conversation(NamedTuple):
    """Messages, and how the assistant reasons in them: a thinking mode and an effort as `chat.encode` takes them."""

    messages: list[dict]
    mode: str
    effort: str | None = None


@dataclass(frozen=True)
class Demonstrations:
    """`count` worked tasks of each environment, or `counts`, one number for each; levels and efforts in equal parts.

    `careless` is the share of them that leaves the last thing out, as people's demonstrations do; held-out ones are all careful.
    """

    environments: tuple[str, ...]
    count: int = 1000
    counts: tuple[int, ...] = ()
    levels: tuple[int, ...] = (1,)
    efforts: tuple[str, ...] = ("chat", "high")
    careless: float = 0.0

    def __post_init__(self):
        wrong = [effort for effort in self.efforts if effort not in EFFORTS]
        if len(self.counts) not in (0, len(self.environments)):
            raise RecipeError(f"demonstrations.counts has {len(self.counts)} numbers for {len(self.environments)} environments; give one for "
                              "each, or count")
        if min((self.count, *self.counts)) < 1 or not self.levels or not self.efforts or wrong:
            raise RecipeError(f"demonstrations: count is {self.count}, counts {list(self.counts)}, levels {list(self.levels)}, efforts {list(self.efforts)}; allowed: at "
                              f"least 1, at least 1, one or more, one or more of {', '.join(EFFORTS)}")
        if not 0 <= self.careless <= 1:
            raise RecipeError(f"demonstrations.careless is {self.careless}; allowed: from 0 to 1")


@dataclass(frozen=True)
class Sft:
    """A fine-tuning run from `base`, a model or run folder, on conversations.

    `messages`: a JSONL file whose rows hold "messages" (OpenAI style) and optionally "thinking_mode" and "reasoning_effort"; `questions`:
    so many generated questions with checked answers, a share of them with reasoning; `demonstrations`: of environments. At least
    one of them. `tune`: all weights, those of the routed experts, or low-rank additions (`lora`). `minutes` and `parallel`: as in
    pre-training; many processes tune all weights.
    """

    run: str
    base: str
    schedule: Schedule
    messages: str | None = None
    questions: int = 0
    thinking_share: float = 0.5
    demonstrations: Demonstrations | None = None
    tune: Tune = "all"
    minutes: float | None = None
    seed: int = 0
    losses: LossWeights = field(default_factory=LossWeights)
    muon: Muon = field(default_factory=Muon)
    adamw: AdamW = field(default_factory=AdamW)
    lora: Lora = field(default_factory=Lora)
    loop: Loop = field(default_factory=Loop)
    parallel: Parallel = field(default_factory=Parallel)

    def __post_init__(self):
        if self.messages is None and self.questions < 1 and self.demonstrations is None:
            raise RecipeError("there is nothing to learn: give messages, a JSONL file, a number of questions, or demonstrations")
        if self.minutes is not None and self.tune == "lora":
            raise RecipeError("minutes are measured for tune all and experts only; give schedule.steps")
        if self.minutes is not None and self.minutes <= 0:
            raise RecipeError(f"minutes is {self.minutes}; allowed: above 0")
        if self.tune != "all" and self.parallel != Parallel():
            raise RecipeError(f"tune {self.tune!r} is for one process; leave parallel out, or set tune to all")
        if not 0 <= self.thinking_share <= 1:
            raise RecipeError(f"thinking_share is {self.thinking_share}; allowed: from 0 to 1")
        if len(self.schedule.lengths) != 1:
            raise RecipeError(f"schedule.lengths is {list(self.schedule.lengths)}; fine-tuning takes one length")


def fine_tune(recipe: Sft, root: Path, resume: bool, console: Console, known: Mapping[str, Environment], device: str = "cpu") -> Path:
    """Run a recipe to its end (or continue it) on a device and return the run's folder. Raises Stopped after Ctrl-C.

    Started by torchrun, this is one of the recipe's `parallel` ranks, and all of them call it.
    """
    with join(recipe.parallel, device) as ranks:
        return _fine_tune(recipe, root, resume, console, known, ranks)


def _fine_tune(recipe: Sft, root: Path, resume: bool, console: Console, known: Mapping[str, Environment], ranks: Ranks) -> Path:
    recipe, model, tokenizer, state = tuned_run(recipe, resume, ranks)
    data = _data(recipe, root, tokenizer, model.config.vocab_size, known)
    console.print(f"{data.conversations:,} conversations in {data.train.rows_in_epoch(0):,} rows of "
                  f"{data.train.sequence_length} tokens, {data.train.efficiency:.1%} full", soft_wrap=True)
    if recipe.minutes and not resume:
        recipe = fit_minutes(recipe, model, lambda trial: _stage(recipe, trial, data, ranks), console, ranks)
    model = parallelise(model, ranks)
    optimizer = (make_optimizer(model, recipe.muon, recipe.adamw, ranks) if recipe.tune == "all" else
                 tuning_optimizer(model, recipe.tune, recipe.base, recipe.muon, recipe.adamw, recipe.lora, recipe.seed))
    run_stage(Path(recipe.run), model, tokenizer, restored(optimizer, state), _stage(recipe, model, data, ranks), recipe.schedule.steps,
              state.step if state else 0, recipe.loop, console, ranks=ranks)
    return Path(recipe.run)


@dataclass(frozen=True)
class SftData:
    """Packed conversations, and a batch of held-out ones where there are any."""

    conversations: int
    train: PackedData
    validation: list[Batch]
    byte_lengths_V: Tensor


def _data(recipe: Sft, root: Path, tokenizer: Tokenizer, vocab_size: int, known: Mapping[str, Environment]) -> SftData:
    train, held_out = (conversations(recipe, root, part, known) for part in (False, True))
    length = recipe.schedule.lengths[0]
    validation = [_pack(held_out, tokenizer, length, 0).batch(0, VALIDATION_ROWS)] if held_out else []
    return SftData(len(train), _pack(train, tokenizer, length, recipe.seed), validation,
                   token_byte_lengths(tokenizer, vocab_size))


def _stage(recipe: Sft, model: Transformer, data: SftData, ranks: Ranks) -> Stage:
    schedule, validation = recipe.schedule, deal(data.validation, ranks) if data.validation else []
    return Stage(
        batch=lambda step: rank_rows(data.train, schedule.first_row_at(step), schedule.batch_rows_at(step), ranks),
        loss=lambda batch, step: objective(model, batch, recipe.losses, schedule.mtp_weight_at(step), "sparse"),
        rate=schedule.rate_at, bias_speed=schedule.bias_speed_at if recipe.tune == "all" else lambda step: 0.0,
        quantised=schedule.quantised_at,
        validate=(lambda: bits_per_byte(model, validation, data.byte_lengths_V, ranks.sum)) if data.validation else None)


def conversations(recipe: Sft, root: Path, held_out: bool, known: Mapping[str, Environment]) -> list[Conversation]:
    """All conversations of a recipe; the held-out ones are generated questions and demonstrations only."""
    rows = []
    if recipe.messages is not None and not held_out:
        rows += _read_messages(root / recipe.messages)
    if recipe.questions:
        rng = random.Random(recipe.seed)
        count = HELD_OUT_QUESTIONS if held_out else recipe.questions
        for pair in make_pairs(count, recipe.seed, held_out):
            thinking = rng.random() < recipe.thinking_share
            rows.append(Conversation(to_messages(pair, thinking), "thinking" if thinking else "chat"))
    if recipe.demonstrations is not None:
        rows += _demonstrations(recipe.demonstrations, recipe.seed, held_out, known)
    return rows


def examples(messages: list[dict], mode: str, tokenizer: Tokenizer, effort: str | None = None) -> list[Example]:
    """What is read and what is learned of a conversation: every assistant turn is learned once, after exactly what is read before it."""
    parts: list[list[tuple[list[int], bool]]] = []
    known: list[int] = []  # the tokens of the last example
    for turn, message in enumerate(messages):
        if message.get("role") == "assistant":
            prompt = chat.tokenize(messages[:turn], tokenizer, mode, effort)
            whole = chat.tokenize(messages[:turn + 1], tokenizer, mode, effort)
            if known and prompt[:len(known)] == known:
                parts[-1].append((prompt[len(known):], False))
            else:
                parts.append([(prompt, False)])
            parts[-1].append((whole[len(prompt):], True))
            known = whole
    return [masked_example(segments) for segments in parts]


def _demonstrations(wanted: Demonstrations, seed: int, held_out: bool, known: Mapping[str, Environment]) -> list[Conversation]:
    rng, rows = random.Random(f"{seed}/{held_out}"), []
    counts = wanted.counts or (wanted.count,) * len(wanted.environments)
    for (name, environment), count in zip(environments_named(wanted.environments, known).items(), counts, strict=True):
        levels = [level for level in wanted.levels if level in environment.levels]
        if not levels:
            raise RecipeError(f"demonstrations.levels is {list(wanted.levels)}; {name} has {environment.levels[0]} to {environment.levels[-1]}")
        for number in range(min(HELD_OUT_QUESTIONS, count) if held_out else count):
            effort = wanted.efforts[number % len(wanted.efforts)]
            level = levels[number // len(wanted.efforts) % len(levels)]
            task = environment.task(rng.randrange(SEEDS), "held_out" if held_out else "train", level)
            careless = wanted.careless and not held_out and rng.random() < wanted.careless
            turns = environment.careless(task, effort) if careless else environment.demonstration(task, effort)
            rows.append(Conversation(task.messages + turns, *EFFORTS[effort]))
    return rows


def _pack(rows: list[Conversation], tokenizer: Tokenizer, length: int, seed: int) -> PackedData:
    learned = [example for row in rows for example in examples(row.messages, row.mode, tokenizer, row.effort)]
    return pack_examples(learned, length, seed, tokenizer.pad_id)


def _read_messages(path: Path) -> list[Conversation]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [Conversation(row["messages"], row.get("thinking_mode", "chat"), row.get("reasoning_effort")) for row in rows]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: every line must be a JSON object with \"messages\"") from None
