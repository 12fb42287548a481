"""A million tokens of real text through a small model: time, memory, cache, the cost of one more token, and facts that get through.

The reading is measured in a process of its own (million_run.py); this one prepares text and model, shows what comes in, and keeps it.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from fathom.accounting import cache_bytes, parameters
from fathom.checkpoint.released import load_model, save_model
from fathom.checkpoint.training import find_model
from fathom.config import ModelConfig, RopeScaling
from fathom.data.corpora import Document, read_documents
from fathom.engine.engine import dtype_of
from fathom.errors import DataError, FathomError, InputError
from fathom.lab import million_facts, million_report, million_run
from fathom.lab.baseline_costs import curves
from fathom.model.transformer import Transformer
from fathom.signals import child_process
from fathom.text.tokenizer import Tokenizer

OWN_TEXT = Path(__file__).resolve().parents[2] / "recipes" / "data" / "austen.jsonl.xz"
VOCABULARY = 2048
MARKS = [1 << power for power in (10, 12, 14, 16, 18, 20)]
FACT = " The number to remember is 58207."
QUERY = " The number to remember is"
RUNNING_BYTES = 600_000_000  # libraries and the work on one chunk, beside weights and cache
LEAST = 1024  # tokens


@dataclass(frozen=True)
class Settings:
    """What to measure. `model`: a folder or run, else random weights by `seed`; `fact_tokens`: 0 plants none."""

    tokens: int = 1 << 20
    chunk: int = 2048
    text: str | None = None
    model: Path | None = None
    dtype: str = "float32"
    seed: int = 0
    fact_tokens: int = 65536
    full_facts: bool = False

    def __post_init__(self):
        dtype_of(self.dtype)
        if self.tokens < LEAST or self.chunk < 1:
            raise InputError(f"tokens is {self.tokens} and chunk {self.chunk}; allowed: at least {LEAST} and 1")
        if self.fact_tokens and self.fact_tokens < LEAST:
            raise InputError(f"fact-tokens is {self.fact_tokens}; allowed: at least {LEAST}, or 0 to plant no fact")


@dataclass(frozen=True)
class Text:
    """Token ids [T] in the order they are read, and where they are from."""

    tokens: numpy.ndarray
    source: str
    documents: int
    once: int  # tokens of all documents, read once


def run_million(settings: Settings, out: Path | None, console: Console) -> dict[str, Any]:
    """Measure, print and, with `out`, keep as JSON and a picture beside it. Ctrl-C ends it early with what there is.

    Raises a FathomError before anything is computed for what cannot be read, written or held in memory.
    """
    folder = None if settings.model is None else find_model(settings.model)
    config = small_config(settings.tokens) if folder is None else ModelConfig.load(folder)
    _check_room(config, settings)
    tokenizer = None if folder is None else Tokenizer.load(folder)
    text, tokenizer = read_text(settings, tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        raise InputError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}")
    result = _empty_result(settings, config, text, tokenizer)
    million_report.keep(result, out)
    console.print(million_report.opening(result), soft_wrap=True)
    with tempfile.TemporaryDirectory(prefix="fathom-million-") as temporary:
        job = Path(temporary)
        if folder is None:
            folder = job / "model"
            save_model(Transformer(config).initialise(settings.seed), folder)
        try:
            _measure(settings, folder, text, tokenizer, job, result, out, console)
            _plant(settings, folder, text, tokenizer, result, out, console)
            result["complete"] = True
        except KeyboardInterrupt:
            console.print("stopped; what was measured so far:", soft_wrap=True)
    million_report.keep(result, out)
    million_report.show(result, out, console)
    return result


def small_config(tokens: int = 1 << 20) -> ModelConfig:
    """V4's layers in small: Flash's schedule, two window layers and then CSA and HCA in turn, 256 wide."""
    return ModelConfig(
        vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=6, num_attention_heads=4, head_dim=64, qk_rope_head_dim=32,
        q_lora_rank=128, o_groups=2, o_lora_rank=64, n_routed_experts=16, num_experts_per_tok=2, moe_intermediate_size=128,
        compress_ratios=(0, 0, 4, 128, 4, 128), index_n_heads=4, index_head_dim=32, index_topk=128, num_hash_layers=1,
        sliding_window=128, rope_scaling=RopeScaling(), num_nextn_predict_layers=0, initializer_range=256**-0.5,
        max_position_embeddings=max(tokens, 1 << 20) + 1024, torch_dtype="float32")


def read_text(settings: Settings, tokenizer: Tokenizer | None) -> tuple[Text, Tokenizer]:
    """The text to read, its last tokens the query, and the tokenizer (trained on the text where none is given).

    Documents stand between begin and end tokens; when all are used up, they follow again in a seeded, shuffled order.
    """
    source = settings.text or str(OWN_TEXT)
    if settings.text is None and not OWN_TEXT.exists():
        raise DataError("the text that comes with the source tree is not installed; name another one with --text")
    documents, characters = [], 0
    for document in read_documents([source], Path()):
        documents.append(document)
        characters += len(document.text)
        if characters > 16 * settings.tokens:
            break  # more than will be read
    if tokenizer is None:
        tokenizer = Tokenizer.train(_first(documents, 4_000_000), VOCABULARY)
    encoded = [[tokenizer.bos_id, *ids, tokenizer.eos_id] for ids in tokenizer.encode_many([each.text for each in documents])]
    once = sum(map(len, encoded))
    shuffle, tokens = numpy.random.default_rng(settings.seed), []
    order = numpy.arange(len(encoded))
    while len(tokens) < settings.tokens:
        for index in order:
            tokens += encoded[index]
            if len(tokens) >= settings.tokens:
                break
        order = shuffle.permutation(len(encoded))
    query = tokenizer.encode(QUERY)
    tokens = numpy.array([*tokens[:settings.tokens - len(query)], *query], dtype=numpy.int64)
    return Text(tokens, Path(source).name, len(documents), once), tokenizer


def _first(documents: list[Document], characters: int) -> Iterator[str]:
    for document in documents:
        if characters <= 0:
            return
        yield document.text[:characters]
        characters -= len(document.text)


def _check_room(config: ModelConfig, settings: Settings) -> None:
    """Refuse what the model's positions or this machine's memory cannot hold."""
    limit = config.max_position_embeddings - million_run.ROOM
    if settings.tokens > limit:
        raise InputError(f"{settings.tokens} tokens and {million_run.ROOM} more to decode are more than the model holds, "
                         f"{config.max_position_embeddings} (max_position_embeddings); give --tokens {limit} or fewer")
    size, counts = dtype_of(settings.dtype).itemsize, parameters(config)
    weights = size * (counts.total + counts.embedding + counts.mtp)
    cache = cache_bytes(config, size).at(settings.tokens + million_run.ROOM)
    text, available = 40 * settings.tokens, available_memory()  # ids as Python's and as numpy's
    needed = weights + cache + text + RUNNING_BYTES
    if needed > available:
        raise InputError(f"{settings.tokens} tokens need about {needed / 1e9:,.1f} GB (cache {cache / 1e9:,.1f}, weights "
                         f"{weights / 1e9:,.1f}), {available / 1e9:,.1f} GB are free; give fewer --tokens")


def available_memory() -> int:
    """Bytes this process can still take: what the system has free, and no more than its control group leaves."""
    free = []
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            free.append(1024 * int(line.split()[1]))
    limit, used = _read("/sys/fs/cgroup/memory.max").strip(), _read("/sys/fs/cgroup/memory.current").strip()
    if limit.isdigit() and used.isdigit():
        free.append(int(limit) - int(used))
    return min(free, default=sys.maxsize)


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError:
        return ""


def _empty_result(settings: Settings, config: ModelConfig, text: Text, tokenizer: Tokenizer) -> dict[str, Any]:
    counts, marks = parameters(config), _marks(settings.tokens)
    options = dataclasses.asdict(settings) | {"model": settings.model and str(settings.model)}
    return {"settings": options | {"text": text.source}, "machine": million_report.machine(), "config": config.to_dict(),
            "parameters": {"total": counts.total, "activated": counts.activated},
            "text": {"source": text.source, "documents": text.documents, "tokens_once": text.once,
                     "times_read": settings.tokens / text.once, "vocabulary": tokenizer.vocab_size,
                     "tokenizer": "trained on it" if settings.model is None else "the model's"},
            "marks": [], "speed": [], "curves": {"contexts": marks} | curves(config, marks, dtype_of(settings.dtype).itemsize),
            "facts": [], "complete": False}


def _marks(tokens: int) -> list[int]:
    return [*(mark for mark in MARKS if mark < tokens), tokens]


def _measure(settings: Settings, folder: Path, text: Text, tokenizer: Tokenizer, job: Path, result: dict[str, Any],
             out: Path | None, console: Console) -> None:
    """Let the other process read, and note what it says."""
    numpy.save(job / million_run.TOKENS, text.tokens)
    fact = tokenizer.encode(FACT) if settings.full_facts else []
    (job / million_run.JOB).write_text(json.dumps(dataclasses.asdict(million_run.Job(
        str(folder), settings.dtype, settings.chunk, tokenizer.vocab_size, _marks(settings.tokens), fact))), encoding="utf-8")
    size = dtype_of(settings.dtype).itemsize
    used = cache_bytes(ModelConfig.from_dict(result["config"]), size)
    speed = million_report.SpeedTrace(settings.tokens)
    result["speed"] = speed.points  # grows
    with _bar("reading", settings.tokens, console) as (progress, task), _child(job) as lines:
        for line in lines:
            event = json.loads(line)
            kind = event.pop("event")
            if kind in ("start", "end"):
                result |= event
            elif kind == "chunk":
                speed.add(**event)
                progress.update(task, completed=event["tokens"], state=f"{speed.latest:,.0f} tokens/s")
            elif kind == "mark":
                ids = event.pop("decoded")
                result["marks"].append(event | {"cache_bytes": used.at(event["tokens"])})
                result["decoded"] = tokenizer.decode(ids)
                million_report.keep(result, out)
                console.print(million_report.mark_line(result["marks"][-1]), soft_wrap=True)
            elif kind == "again":
                progress.update(task, description="again, with a fact", completed=event["tokens"], state="",
                                total=settings.tokens - million_facts.place_at(settings.tokens, million_run.FULL_FACT_DEPTH))
            else:
                result["facts"].append(event)


@contextmanager
def _child(job: Path) -> Iterator[Any]:
    """The lines of the measuring process, which ends with the block; an InputError where it ended badly by itself.

    It is a session of its own, so that Ctrl-C in a terminal is for this process alone.
    """
    command = [sys.executable, "-m", "fathom.lab.million_run", str(job)]
    with child_process(command, stdout=subprocess.PIPE, text=True, start_new_session=True) as process:
        yield process.stdout
        process.wait()
    if process.returncode:
        raise MeasurementError(f"the measuring process ended with exit code {process.returncode}"
                               + (" (killed, perhaps for its memory)" if process.returncode == -9 else ""))


class MeasurementError(FathomError):
    """The process that measures did not reach its end."""


def _plant(settings: Settings, folder: Path, text: Text, tokenizer: Tokenizer, result: dict[str, Any], out: Path | None,
           console: Console) -> None:
    """Facts at several depths of the text's first tokens, with the query at their end."""
    tokens = min(settings.fact_tokens, settings.tokens)
    if not tokens:
        return
    query = tokenizer.encode(QUERY)
    token_T = torch.from_numpy(numpy.array([*text.tokens[:tokens - len(query)], *query]))
    model = load_model(folder, dtype_of(settings.dtype))
    with torch.inference_mode(), _bar("planting facts", million_facts.reading(tokens), console) as (progress, task):
        for fact in million_facts.plant(model, token_T, torch.tensor(tokenizer.encode(FACT)), settings.chunk,
                                        seen=lambda more: progress.advance(task, more)):
            result["facts"].append(dataclasses.asdict(fact))
            result["facts"].sort(key=lambda each: (each["context"], each["depth"]))
            million_report.keep(result, out)


@contextmanager
def _bar(name: str, total: int, console: Console) -> Iterator[tuple[Progress, TaskID]]:
    """A progress bar in tokens; nothing where the output is no terminal."""
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.completed:,} of {task.total:,} tokens"),
               TextColumn("{task.fields[state]}"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, refresh_per_second=2) as progress:
        yield progress, progress.add_task(name, total=total, state="")
