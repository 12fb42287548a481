"""Supervised fine-tuning: a base model learns to answer in the chat format (report 5.1.1).

Only the assistant's tokens are learned; every assistant turn of a conversation is an example, encoded exactly as the
model will meet it when it is asked.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from torch import Tensor

from fathom.checkpoint.released import load_model
from fathom.checkpoint.training import find_model
from fathom.data.packing import Batch, PackedData
from fathom.data.questions import make_pairs, to_messages
from fathom.data.transforms import Example, masked_example, pack_examples
from fathom.errors import DataError, RecipeError
from fathom.evals.perplexity import bits_per_byte, token_byte_lengths
from fathom.model.transformer import Transformer
from fathom.optim.muon import AdamW, Muon, Optimizer
from fathom.optim.schedules import Schedule
from fathom.text import chat
from fathom.text.tokenizer import Tokenizer
from fathom.train.loop import Loop, Stage, run_stage
from fathom.train.objective import LossWeights, objective
from fathom.train.run_folder import continue_run, fit_minutes, resumed_recipe, restored, start_run

HELD_OUT_QUESTIONS = 200
VALIDATION_ROWS = 16

Conversation = tuple[list[dict], str, str | None]  # messages, thinking mode, reasoning effort


@dataclass(frozen=True)
class Sft:
    """A fine-tuning run from `base`, a model or run folder, on conversations.

    `messages`: a JSONL file whose rows hold "messages" (OpenAI style) and optionally "thinking_mode" and "reasoning_effort"
    ("high" or "max"); `questions`: so many generated questions with checked answers, a share of them with reasoning. At least
    one of the two. `minutes`: as in pre-training.
    """

    run: str
    base: str
    schedule: Schedule
    messages: str | None = None
    questions: int = 0
    thinking_share: float = 0.5
    minutes: float | None = None
    seed: int = 0
    losses: LossWeights = field(default_factory=LossWeights)
    muon: Muon = field(default_factory=Muon)
    adamw: AdamW = field(default_factory=AdamW)
    loop: Loop = field(default_factory=Loop)

    def __post_init__(self):
        if self.messages is None and self.questions < 1:
            raise RecipeError("there is nothing to learn: give messages, a JSONL file, or a number of questions")
        if self.minutes is not None and self.minutes <= 0:
            raise RecipeError(f"minutes is {self.minutes}; allowed: above 0")
        if not 0 <= self.thinking_share <= 1:
            raise RecipeError(f"thinking_share is {self.thinking_share}; allowed: from 0 to 1")
        if len(self.schedule.lengths) != 1:
            raise RecipeError(f"schedule.lengths is {list(self.schedule.lengths)}; fine-tuning takes one length")


def fine_tune(recipe: Sft, root: Path, resume: bool, console: Console) -> Path:
    """Run a recipe to its end (or continue it) and return the run's folder. Raises Stopped after Ctrl-C."""
    run, state = Path(recipe.run), None
    if resume:
        recipe = resumed_recipe(run, recipe)
        model, state = continue_run(run)
        tokenizer = Tokenizer.load(run / "tokenizer")
    else:
        folder = find_model(recipe.base)
        model, tokenizer = load_model(folder), Tokenizer.load(folder)
        start_run(run, recipe)
        (run / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(run / "tokenizer")
    data = _data(recipe, root, tokenizer, model.config.vocab_size)
    console.print(f"{data.conversations:,} conversations in {data.train.rows_in_epoch(0):,} rows of "
                  f"{data.train.sequence_length} tokens, {data.train.efficiency:.1%} full", soft_wrap=True)
    if recipe.minutes and not resume:
        recipe = fit_minutes(recipe, model, lambda trial: _stage(recipe, trial, data), console)
    optimizer = restored(Optimizer(model.named_parameters(), model.config, recipe.muon, recipe.adamw), state)
    run_stage(run, model, tokenizer, optimizer, _stage(recipe, model, data), recipe.schedule.steps,
              state.step if state else 0, recipe.loop, console)
    return run


@dataclass(frozen=True)
class SftData:
    """Packed conversations, and a batch of held-out ones where there are any."""

    conversations: int
    train: PackedData
    validation: list[Batch]
    byte_lengths_V: Tensor


def _data(recipe: Sft, root: Path, tokenizer: Tokenizer, vocab_size: int) -> SftData:
    train, held_out = (conversations(recipe, root, part) for part in (False, True))
    length = recipe.schedule.lengths[0]
    validation = [_pack(held_out, tokenizer, length, 0).batch(0, VALIDATION_ROWS)] if held_out else []
    return SftData(len(train), _pack(train, tokenizer, length, recipe.seed), validation,
                   token_byte_lengths(tokenizer, vocab_size))


def _stage(recipe: Sft, model: Transformer, data: SftData) -> Stage:
    schedule = recipe.schedule
    return Stage(
        batch=lambda step: data.train.rows(schedule.first_row_at(step), schedule.batch_rows_at(step)),
        loss=lambda batch, step: objective(model, batch, recipe.losses, schedule.mtp_weight_at(step), "sparse"),
        rate=schedule.rate_at, bias_speed=schedule.bias_speed_at, quantised=schedule.quantised_at,
        validate=(lambda: bits_per_byte(model, data.validation, data.byte_lengths_V)) if data.validation else None)


def conversations(recipe: Sft, root: Path, held_out: bool) -> list[Conversation]:
    """All conversations of a recipe with their thinking modes and efforts; the held-out ones are generated questions only."""
    rows = []
    if recipe.messages is not None and not held_out:
        rows += _read_messages(root / recipe.messages)
    if recipe.questions:
        rng = random.Random(recipe.seed)
        count = HELD_OUT_QUESTIONS if held_out else recipe.questions
        for pair in make_pairs(count, recipe.seed, held_out):
            thinking = rng.random() < recipe.thinking_share
            rows.append((to_messages(pair, thinking), "thinking" if thinking else "chat", None))
    return rows


def examples(messages: list[dict], mode: str, tokenizer: Tokenizer, effort: str | None = None) -> list[Example]:
    """One example for each assistant turn: everything before it is read, the turn itself is learned."""
    out = []
    for turn, message in enumerate(messages):
        if message.get("role") == "assistant":
            prompt = chat.tokenize(messages[:turn], tokenizer, mode, effort)
            whole = chat.tokenize(messages[:turn + 1], tokenizer, mode, effort)
            out.append(masked_example([(prompt, False), (whole[len(prompt):], True)]))
    return out


def _pack(rows: list[Conversation], tokenizer: Tokenizer, length: int, seed: int) -> PackedData:
    learned = [example for messages, mode, effort in rows for example in examples(messages, mode, tokenizer, effort)]
    return pack_examples(learned, length, seed, tokenizer.pad_id)


def _read_messages(path: Path) -> list[Conversation]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(row["messages"], row.get("thinking_mode", "chat"), row.get("reasoning_effort")) for row in rows]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: every line must be a JSON object with \"messages\"") from None
