"""An engine that answers until its process is killed; imported once by a fork server, so that a hundred of them start quickly."""

from functools import cache
from pathlib import Path

import torch

from fathom.engine.disk_cache import DiskCache
from fathom.engine.engine import Engine
from fathom.engine.request import Request
from fathom.engine.sampler import Sampling
from fathom.engine.settings import EngineSettings
from fathom.model.transformer import Transformer
from fathom.text.tokenizer import Tokenizer
from tests.models import random_model, small_config

BUDGET = 1_500_000  # about a third of what the prompts leave behind: files are removed all the time


@cache
def parts() -> tuple[Transformer, Tokenizer]:
    """The same model in every process."""
    return (random_model(small_config([4, 128], vocab_size=320, sliding_window=32, index_topk=4)),
            Tokenizer.train(["a small page of text"] * 3, 300))


def prompts() -> list[tuple[int, ...]]:
    """Eight of them, in pairs with a common beginning."""
    tokens = torch.randint(25, 300, (8, 700), generator=torch.Generator().manual_seed(11))
    tokens[4:, :400] = tokens[:4, :400]
    return [tuple(row) for row in tokens.tolist()]


def started(folder: Path) -> Engine:
    """An engine over the cache in a folder."""
    settings = EngineSettings(prefill_chunk=256, interval=256, cache_bytes=8 << 20, running=4)
    return Engine(*parts(), settings=settings, disk=DiskCache(folder, BUDGET, "model", sync=False))


def ask(engine: Engine, prompt: tuple[int, ...]):
    """The first token after a prompt, with its most likely rivals."""
    output, = engine.run(Request(prompt, Sampling(temperature=0, max_tokens=1, logprobs=5, ignore_eos=True)))
    return output


def answer_for_ever(folder: Path, seed: int, ready) -> None:
    """Ask for prompts of any length in any order."""
    torch.set_num_threads(1)
    engine, texts = started(folder), prompts()
    generator = torch.Generator().manual_seed(seed)
    ready.set()
    while True:
        pick, length = (int(torch.randint(low, high, (), generator=generator)) for low, high in ((0, 8), (100, 700)))
        ask(engine, texts[pick][:length])
