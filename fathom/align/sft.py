"""Supervised fine-tuning: a base model learns to answer in the chat format (report 5.1.1).

Only the assistant's tokens are learned; every assistant turn of a conversation is an example, encoded exactly as the
model will meet it when it is asked.
"""

import json
import random
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from fathom.checkpoint.released import load_model
from fathom.checkpoint.training import find_model
from fathom.data.packing import PackedData
from fathom.data.questions import make_pairs, to_messages
from fathom.data.transforms import Example, masked_example, pack_examples
from fathom.errors import DataError, RecipeError
from fathom.evals.perplexity import bits_per_byte, token_byte_lengths
from fathom.optim.muon import AdamW, Muon, Optimizer
from fathom.optim.schedules import Schedule
from fathom.text import chat
from fathom.text.tokenizer import Tokenizer
from fathom.train.loop import Loop, Stage, run_stage
from fathom.train.objective import LossWeights, objective
from fathom.train.run_folder import check_same, continue_run, restored, start_run, stored_recipe

HELD_OUT_QUESTIONS = 200
VALIDATION_ROWS = 16


@dataclass(frozen=True)
class Sft:
    """A fine-tuning run from `base`, a model or run folder, on conversations.

    `messages`: a JSONL file whose rows hold "messages" (OpenAI style) and optionally "thinking_mode"; `questions`: so many
    generated questions with checked answers, a share of them with reasoning. At least one of the two.
    """

    run: str
    base: str
    schedule: Schedule
    messages: str | None = None
    questions: int = 0
    thinking_share: float = 0.5
    seed: int = 0
    losses: LossWeights = field(default_factory=LossWeights)
    muon: Muon = field(default_factory=Muon)
    adamw: AdamW = field(default_factory=AdamW)
    loop: Loop = field(default_factory=Loop)

    def __post_init__(self):
        if self.messages is None and self.questions < 1:
            raise RecipeError("there is nothing to learn: give messages, a JSONL file, or a number of questions")
        if not 0 <= self.thinking_share <= 1:
            raise RecipeError(f"thinking_share is {self.thinking_share}; allowed: from 0 to 1")
        if len(self.schedule.lengths) != 1:
            raise RecipeError(f"schedule.lengths is {list(self.schedule.lengths)}; fine-tuning takes one length")


def fine_tune(recipe: Sft, root: Path, resume: bool, console: Console) -> Path:
    """Run a recipe to its end (or continue it) and return the run's folder. Raises Stopped after Ctrl-C."""
    run, state = Path(recipe.run), None
    if resume:
        check_same(run, stored_recipe(run, recipe), recipe)
        model, state = continue_run(run)
        tokenizer = Tokenizer.load(run / "tokenizer")
    else:
        folder = find_model(recipe.base)
        model, tokenizer = load_model(folder), Tokenizer.load(folder)
        start_run(run, recipe)
        (run / "tokenizer").mkdir(exist_ok=True)
        tokenizer.save(run / "tokenizer")
    train, held_out = (conversations(recipe, root, part) for part in (False, True))
    length, rows = recipe.schedule.lengths[0], recipe.schedule.batch_rows_at
    packed = _pack(train, tokenizer, length, recipe.seed)
    validation = None
    if held_out:
        byte_lengths_V = token_byte_lengths(tokenizer, model.config.vocab_size)
        batches = [_pack(held_out, tokenizer, length, 0).batch(0, VALIDATION_ROWS)]
        validation = lambda: bits_per_byte(model, batches, byte_lengths_V)  # noqa: E731
    console.print(f"{len(train):,} conversations in {packed.rows_in_epoch(0):,} rows of {length} tokens, "
                  f"{packed.efficiency:.1%} full", soft_wrap=True)
    schedule = recipe.schedule
    stage = Stage(
        batch=lambda step: packed.rows(schedule.first_row_at(step), rows(step)),
        loss=lambda batch, step: objective(model, batch, recipe.losses, schedule.mtp_weight_at(step), "sparse"),
        rate=schedule.rate_at, bias_speed=schedule.bias_speed_at, validate=validation)
    optimizer = restored(Optimizer(model.named_parameters(), model.config, recipe.muon, recipe.adamw), state)
    run_stage(run, model, tokenizer, optimizer, stage, schedule.steps, state.step if state else 0, recipe.loop, console)
    return run


def conversations(recipe: Sft, root: Path, held_out: bool) -> list[tuple[list[dict], str]]:
    """All conversations of a recipe with their thinking modes; the held-out ones are generated questions only."""
    rows = []
    if recipe.messages is not None and not held_out:
        rows += _read_messages(root / recipe.messages)
    if recipe.questions:
        rng = random.Random(recipe.seed)
        count = HELD_OUT_QUESTIONS if held_out else recipe.questions
        for pair in make_pairs(count, recipe.seed, held_out):
            thinking = rng.random() < recipe.thinking_share
            rows.append((to_messages(pair, thinking), "thinking" if thinking else "chat"))
    return rows


def examples(messages: list[dict], mode: str, tokenizer: Tokenizer) -> list[Example]:
    """One example for each assistant turn: everything before it is read, the turn itself is learned."""
    out = []
    for turn, message in enumerate(messages):
        if message.get("role") == "assistant":
            prompt = chat.tokenize(messages[:turn], tokenizer, mode)
            whole = chat.tokenize(messages[:turn + 1], tokenizer, mode)
            out.append(masked_example([(prompt, False), (whole[len(prompt):], True)]))
    return out


def _pack(rows: list[tuple[list[dict], str]], tokenizer: Tokenizer, length: int, seed: int) -> PackedData:
    learned = [example for messages, mode in rows for example in examples(messages, mode, tokenizer)]
    return pack_examples(learned, length, seed, tokenizer.pad_id)


def _read_messages(path: Path) -> list[tuple[list[dict], str]]:
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return [(row["messages"], row.get("thinking_mode", "chat")) for row in rows]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError):
        raise DataError(f"{path}: every line must be a JSON object with \"messages\"") from None
