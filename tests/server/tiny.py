"""A real engine over a tiny random model, whose answers are cut short: all the machinery, little of the work."""

from dataclasses import replace

from fathom.engine.engine import Engine
from fathom.engine.request import Request
from fathom.engine.settings import EngineSettings
from fathom.text.tokenizer import Tokenizer
from tests.models import random_model, small_config

TEXTS = ("the quick brown fox jumps over the lazy dog and says hello world", '{"city": "Paris", "days": 21}', "0123456789")
LONGEST_ANSWER = 4


class ShortEngine(Engine):
    """Writes a few tokens, whatever was asked for, and remembers the most blocks that were ever in use."""

    most_blocks = 0

    def add(self, request: Request) -> int:
        """As the engine's own."""
        sampling = request.sampling
        return super().add(replace(request, sampling=replace(sampling, max_tokens=min(sampling.max_tokens, LONGEST_ANSWER))))

    def step(self) -> list:
        """As the engine's own."""
        outputs = super().step()
        self.most_blocks = max(self.most_blocks, self.stats().blocks_used)
        return outputs


def tiny_engine(settings: EngineSettings = EngineSettings(), kind: type[Engine] = ShortEngine) -> Engine:
    """Two layers, a vocabulary of bytes and some words, 4,096 tokens of context."""
    tokenizer = Tokenizer.train(TEXTS, 400)
    return kind(random_model(small_config([4, 128], vocab_size=tokenizer.vocab_size)), tokenizer, settings=settings)
