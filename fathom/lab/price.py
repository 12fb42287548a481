"""`fathom lab price`: what conversations cost by a price list, and what a million tokens cost on hardware of one's own.

A further turn's prompt begins with the last one's and its answer, which the cache holds in whole blocks; only what is new is paid in full.
"""

import datetime
import math
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from fathom import recipe
from fathom.errors import InputError

PRICES = Path(__file__).parent / "prices.toml"
MILLION = 1e6


@dataclass(frozen=True)
class PriceList:
    """USD per million tokens of one model, valid from a day on; `peak_factor` multiplies all in peak hours."""

    model: str
    since: str
    hit: float
    miss: float
    output: float
    peak_factor: float = 1.0
    note: str = ""

    def __post_init__(self):
        try:
            datetime.date.fromisoformat(self.since)
        except ValueError:
            raise ValueError(f"since is {self.since!r}; allowed: a day such as \"2026-04-24\"") from None
        for name in ("hit", "miss", "output", "peak_factor"):
            if not (math.isfinite(value := getattr(self, name)) and value >= 0):
                raise ValueError(f"{name} is {value}; allowed: at least 0")


@dataclass(frozen=True)
class PriceTable:
    """Price lists, as a TOML file has them."""

    lists: tuple[PriceList, ...]


class Tokens(NamedTuple):
    """What is paid for."""

    hit: int
    miss: int
    output: int


@dataclass(frozen=True)
class Workload:
    """Conversations: tokens of the first prompt (of which `shared` are in the cache already), of each further message and of each
    answer. The cache keeps whole blocks of `block` tokens (128 in V4: the least common multiple of its compression ratios)."""

    conversations: int = 1
    turns: int = 1
    prompt: int = 1000
    message: int = 100
    answer: int = 500
    shared: int = 0
    block: int = 128

    def __post_init__(self):
        for name, least in (("conversations", 1), ("turns", 1), ("prompt", 1), ("message", 0), ("answer", 0), ("shared", 0), ("block", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}; allowed: at least {least}")
        if self.shared > self.prompt:
            raise InputError(f"shared is {self.shared}; allowed: at most the prompt, {self.prompt}")

    def tokens(self) -> Tokens:
        """Of all conversations together."""
        hit = total = 0
        known = self.shared
        for turn in range(self.turns):
            prompt = self.prompt + turn * (self.answer + self.message)
            hit += min(known, prompt) // self.block * self.block
            total += prompt
            known = prompt + self.answer
        many = self.conversations
        return Tokens(many * hit, many * (total - hit), many * self.turns * self.answer)


def cost(tokens: Tokens, prices: PriceList, peak: bool = False) -> float:
    """USD of these tokens by a price list."""
    plain = (tokens.hit * prices.hit + tokens.miss * prices.miss + tokens.output * prices.output) / MILLION
    return plain * (prices.peak_factor if peak else 1.0)


def per_million(dollars_an_hour: float, tokens_a_second: float) -> float:
    """USD per million tokens of hardware at this price and throughput, busy all the time."""
    if not (dollars_an_hour >= 0 and math.isfinite(dollars_an_hour)):
        raise InputError(f"the price of an hour is {dollars_an_hour}; allowed: at least 0")
    if not (tokens_a_second > 0 and math.isfinite(tokens_a_second)):
        raise InputError(f"the throughput is {tokens_a_second} tokens a second; allowed: above 0")
    return dollars_an_hour / (tokens_a_second * 3600) * MILLION


def own_prices(dollars_an_hour: float, read_a_second: float, write_a_second: float) -> PriceList:
    """A price list of one's own hardware: misses at the speed of reading, output at that of writing, hits for nothing."""
    return PriceList("own hardware", datetime.date.today().isoformat(), 0.0, per_million(dollars_an_hour, read_a_second),
                     per_million(dollars_an_hour, write_a_second), note=f"{dollars_an_hour:g} USD an hour, {read_a_second:g} tokens/s "
                     f"read, {write_a_second:g} written, always busy")


def run_price(workload: Workload, prices: Path | None, hour: float | None, read: float | None, write: float | None,
              console: Console) -> list[tuple[PriceList, float]]:
    """Print and return what the workload costs by each price list, and on hardware of `hour` USD an hour where given."""
    lists = recipe.load(PriceTable, prices or PRICES).lists
    if not lists:
        raise InputError(f"{prices} holds no price list; add [[lists]] with model, since, hit, miss and output")
    if hour is not None:
        if read is None or write is None:
            raise InputError("hardware needs its measured speed: give --read and --write in tokens a second (fathom bench measures them)")
        lists = (*lists, own_prices(hour, read, write))
    tokens = workload.tokens()
    total = tokens.hit + tokens.miss
    console.print(f"{workload.conversations:,} conversations of {workload.turns} turns: {total:,} tokens in ({tokens.hit / total:.1%} found in "
                  f"the cache), {tokens.output:,} out", soft_wrap=True)
    table = Table("model", "since", "hit", "miss", "output", "USD", "at peak", "note")
    for column in table.columns[2:7]:
        column.justify = "right"
    for each in lists:
        peak = f"{cost(tokens, each, peak=True):,.4f}" if each.peak_factor != 1 else ""
        table.add_row(each.model, each.since, *(f"{price:.4g}" for price in (each.hit, each.miss, each.output)),
                      f"{cost(tokens, each):,.4f}", peak, each.note)
    console.print(table)
    return [(each, cost(tokens, each)) for each in lists]
