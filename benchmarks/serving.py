"""What serving costs: many streams at once against one and against the engine without HTTP, repeated prompts, a full queue.

    python benchmarks/serving.py model runs/random-tiny     makes a model of the preset tiny with random weights, if there is no trained one
    python benchmarks/serving.py streams runs/tiny-chat     about 7 minutes: 64 streams for 2 minutes, one stream, the bare engine
    python benchmarks/serving.py prefix runs/tiny-chat      time to first token of 13K- and 32K-token prompts, cold and again
    python benchmarks/serving.py queue runs/tiny-chat       how soon a request is refused while the queue is full

Each prints a Markdown table and keeps its figures in benchmarks/results/serving.json, with the machine and its load. The server runs in
a process of its own. Only ratios within one run mean something on a machine that does other work too.
"""

import asyncio
import json
import multiprocessing
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httptools
import torch

from fathom.checkpoint.released import save_model
from fathom.config import ModelConfig
from fathom.engine.engine import Engine
from fathom.engine.request import Request
from fathom.engine.sampler import Sampling
from fathom.model.transformer import Transformer
from fathom.text.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "serving.json"
WORDS = ("the morning was fine and Emma walked to the village with her sister while the rain held off until the evening came and "
         "every window of the house was lit").split()
STREAMS, SECONDS, ANSWER, ROUNDS = 64, 120, 200, 3
TEXT = re.compile(rb'content": ?"[^"]|arguments": ?"[^"]')


def prompt(seed: int, words: int = 60) -> str:
    """Words in an order of the seed's own."""
    generator = random.Random(seed)
    return " ".join(generator.choice(WORDS) for _ in range(words))


@contextmanager
def server(model: str, *options: str) -> Iterator[int]:
    """A server process; its port."""
    command = [sys.executable, "-m", "fathom.cli", "serve", model, "--port", "0", *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    port = None
    for line in process.stderr:
        if found := re.search(r"http://127\.0\.0\.1:(\d+)", line):
            port = int(found[1])
            break
    if port is None:
        raise SystemExit("the server did not start")
    log = open("/dev/null", "w")
    drain = multiprocessing.get_context("fork").Process(target=lambda: [log.write(line) for line in process.stderr], daemon=True)
    drain.start()
    try:
        yield port
    finally:
        process.terminate()
        process.wait(60)
        drain.terminate()


class _Lines:
    """The body of a response, as httptools hands it over."""

    def __init__(self):
        self.status, self.body, self.done = None, [], False

    def on_body(self, data: bytes) -> None:
        self.body.append(data)

    def on_message_complete(self) -> None:
        self.done = True


async def ask(port: int, body: dict, path: str = "/v1/chat/completions") -> tuple[int, float, int, dict]:
    """One request: status, seconds to the first event with text, events with text, and the last event's usage (or the whole body)."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    data = json.dumps(body).encode()
    writer.write(f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    began, first, events, rest, last = time.monotonic(), 0.0, 0, b"", b""
    lines = _Lines()
    parser = httptools.HttpResponseParser(lines)
    while not lines.done:
        piece = await reader.read(1 << 16)
        if not piece:
            break
        parser.feed_data(piece)
        text = rest + b"".join(lines.body)
        lines.body.clear()
        *whole, rest = text.split(b"\n\n") if body.get("stream") else (text,)
        for event in whole:
            if event.startswith(b"data: {"):
                last = event
                events += TEXT.search(event) is not None
                if not first and events:
                    first = time.monotonic() - began
    writer.close()
    status = parser.get_status_code()
    if not body.get("stream") or status != 200:
        return status, time.monotonic() - began, events, json.loads(rest or b"{}")
    return status, first, events, json.loads(last[6:] or b"{}")


def chat_body(seed: int, **changes: object) -> dict:
    return {"model": "m", "messages": [{"role": "user", "content": prompt(seed)}], "thinking": {"type": "disabled"}, "stream": True,
            "max_tokens": ANSWER, "temperature": 1, "seed": seed, "ignore_eos": True, **changes}


async def many_streams(port: int, streams: int, seconds: float, first_turn: int = 0) -> dict:
    """Each stream asks again as soon as it has its answer, from its question number `first_turn` on."""
    end = time.monotonic() + seconds
    tokens, failures, firsts = [0] * streams, 0, []

    async def stream(index: int) -> None:
        nonlocal failures
        turn = first_turn
        while time.monotonic() < end:
            status, first, _, last = await ask(port, chat_body(index * 10_000 + turn))
            turn += 1
            usage = last.get("usage") or {}
            if status != 200 or usage.get("completion_tokens") != ANSWER:
                failures += 1
            tokens[index] += usage.get("completion_tokens", 0)
            firsts.append(first)

    began = time.monotonic()
    await asyncio.gather(*(stream(index) for index in range(streams)))
    took = time.monotonic() - began
    return {"streams": streams, "seconds": took, "tokens_per_second": sum(tokens) / took, "failures": failures, "requests": len(firsts),
            "slowest_to_fastest_stream": min(tokens) / max(tokens), "first_token_median": statistics.median(firsts),
            "first_token_p99": sorted(firsts)[int(len(firsts) * 0.99) - 1 if len(firsts) > 1 else 0]}


def bare_engine(model: str, streams: int, seconds: float, threads: int, results: multiprocessing.Queue) -> None:
    """The same load without HTTP, in a process of its own."""
    torch.set_num_threads(threads)
    engine = Engine.load(model)
    from_text = engine.tokenizer.encode
    turns, running, tokens = [0] * streams, {}, 0

    def begin(index: int) -> None:
        body = chat_body(index * 10_000 + turns[index])
        ids = from_text(f"<｜begin▁of▁sentence｜><｜User｜>{body['messages'][0]['content']}<｜Assistant｜></think>", special=True)
        sampling = Sampling(temperature=1, seed=body["seed"], max_tokens=ANSWER, ignore_eos=True)
        turns[index] += 1
        running[engine.add(Request(tuple(ids), sampling, input_end=len(ids) - 1))] = index

    began = time.monotonic()
    for index in range(streams):
        begin(index)
    while engine.has_work:
        for output in engine.step():
            tokens += len(output.tokens)
            if output.finish and time.monotonic() - began < seconds:
                begin(running.pop(output.request))
    took = time.monotonic() - began
    engine.close()
    results.put(tokens / took)


def bare(model: str, streams: int, seconds: float, threads: int) -> float:
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=bare_engine, args=(model, streams, seconds, threads, results))
    process.start()
    rate = results.get()
    process.join()
    return rate


def measure_streams(model: str, seconds: float = SECONDS) -> dict:
    cores = torch.get_num_threads()
    threads = max(1, cores - 1)  # as many as `fathom serve` gives the engine
    rounds = []
    with server(model, "--name", "m") as port:
        asyncio.run(many_streams(port, 2, 3))
        one = asyncio.run(many_streams(port, 1, 20))
        many = asyncio.run(many_streams(port, STREAMS, seconds))
        for number in range(1, 1 + ROUNDS):  # in turns, for the machine's speed changes within minutes
            served = asyncio.run(many_streams(port, STREAMS, seconds / 6, 1000 * number))  # nothing that the prefix cache knows
            rounds.append([served["tokens_per_second"], *(bare(model, STREAMS, seconds / 6, count) for count in (threads, cores))])
    served, some, every = (statistics.median(column) for column in zip(*rounds, strict=True))
    figures = {"one": one, "many": many, "threads": [threads, cores], "rounds_served_and_bare": rounds,
               "against_one_stream": many["tokens_per_second"] / one["tokens_per_second"],
               "overhead_same_threads": 1 - served / some, "overhead": 1 - served / max(some, every)}
    print(f"""
| | tokens/s | |
| --- | --- | --- |
| one stream | {one['tokens_per_second']:.0f} | first token after {one['first_token_median'] * 1000:.0f} ms (median) |
| {STREAMS} streams, {many['seconds']:.0f} s | {many['tokens_per_second']:.0f} | {figures['against_one_stream']:.1f} times one; {many['requests']} answers, \
{many['failures']} failures; slowest stream {many['slowest_to_fastest_stream']:.0%} of the fastest; first token {many['first_token_median'] * 1000:.0f} ms \
(median), {many['first_token_p99'] * 1000:.0f} ms (99%) |
| {STREAMS} streams, medians of {ROUNDS} rounds of {seconds / 6:.0f} s in turns | {served:.0f} | the engine alone: {some:.0f} with {threads} threads, \
{every:.0f} with {cores}; HTTP costs {figures['overhead_same_threads']:.1%} at the same threads, {figures['overhead']:.1%} of the better |""")
    return figures


def measure_prefix(model: str) -> dict:
    """Prompts of 13K and 32K tokens, cold, the very same again, and with another question at the end."""
    engine_tokens = Engine.load(model).tokenizer
    figures = {}
    with server(model, "--name", "m", "--cache-gib", "2") as port:
        asyncio.run(ask(port, chat_body(1, max_tokens=4)))
        for name, tokens in (("13K", 13_000), ("32K", 32_000)):
            text = prompt(tokens, tokens)
            ids = engine_tokens.encode(text)[:tokens]
            text = engine_tokens.decode(ids)

            def first(question: str) -> tuple[float, dict]:
                message = {"role": "user", "content": text + question}
                status, seconds, _, last = asyncio.run(ask(port, chat_body(1, messages=[message], max_tokens=4)))
                assert status == 200, last
                return seconds, last["usage"]

            cold, usage = first(" Why?")
            again = statistics.median(first(" Why?")[0] for _ in range(5))
            first(" What comes next?")  # where the two part becomes a place to start from
            other, other_usage = first(" Who is it?")
            figures[name] = {"tokens": usage["prompt_tokens"], "cold": cold, "again": again, "other_question": other,
                             "other_hit_tokens": other_usage["prompt_cache_hit_tokens"], "again_share": again / cold,
                             "other_share": other / cold}
    print("\n| prompt | cold | the same again | another question at the end |\n| --- | --- | --- | --- |")
    for each in figures.values():
        print(f"| {each['tokens']:,} tokens | {each['cold']:.2f} s | {each['again'] * 1000:.0f} ms (1/{1 / each['again_share']:.0f}) | "
              f"{each['other_question'] * 1000:.0f} ms ({each['other_share']:.1%}; {each['other_hit_tokens']:,} tokens hit) |")
    return figures


async def _fill_and_knock(port: int, wanted: int) -> list[float]:
    """Seconds until each of so many requests was refused, while one runs and all places to wait are taken."""
    busy: list[asyncio.Task] = []
    while not any(each.done() for each in busy):  # the first that is done found no place
        busy.append(asyncio.ensure_future(ask(port, chat_body(len(busy), max_tokens=7000))))
        await asyncio.sleep(0.5)  # time for the first to leave the queue
    refused = []
    while len(refused) < wanted:
        began = time.monotonic()
        status, *_ = await asyncio.wait_for(ask(port, chat_body(99, stream=False, max_tokens=1)), 60)
        if status != 429:
            raise SystemExit(f"the queue was full, but a request was answered with {status}")
        refused.append(time.monotonic() - began)
        await asyncio.sleep(0.02)
    for each in busy:
        each.cancel()
    await asyncio.gather(*busy, return_exceptions=True)
    return sorted(refused)


def measure_queue(model: str, wanted: int = 100) -> dict:
    """One request runs, eight wait, and others knock; each on a connection of its own, which counts."""
    with server(model, "--name", "m", "--running", "1", "--waiting", "8") as port:
        seconds = asyncio.run(_fill_and_knock(port, wanted))
    figures = {"refusals": len(seconds), "median_ms": statistics.median(seconds) * 1000, "p99_ms": seconds[int(len(seconds) * 0.99) - 1] * 1000,
               "slowest_ms": seconds[-1] * 1000}
    print(f"\n{len(seconds)} requests refused with 429: {figures['median_ms']:.1f} ms (median), {figures['p99_ms']:.1f} ms (99%), "
          f"{figures['slowest_ms']:.1f} ms (slowest)")
    return figures


def make_model(folder: str) -> None:
    """The preset tiny with random weights, and a tokenizer of the benchmark's own words."""
    tokenizer = Tokenizer.train([prompt(seed, 2000) for seed in range(4)], 4096)
    save_model(Transformer(ModelConfig.preset("tiny")).initialise(0), folder)
    tokenizer.save(folder)


def machine() -> dict:
    """What the figures were measured on, and how much else ran there."""
    return {"cores": len(os.sched_getaffinity(0)), "load": [round(load, 1) for load in os.getloadavg()], "torch": torch.__version__,
            "python": platform.python_version()}


def main() -> None:
    """Measure, print, keep."""
    commands = {"streams": measure_streams, "prefix": measure_prefix, "queue": measure_queue}
    if len(sys.argv) != 3 or sys.argv[1] not in (*commands, "model"):
        raise SystemExit(__doc__)
    if sys.argv[1] == "model":
        make_model(sys.argv[2])
        return
    before = machine()
    figures = commands[sys.argv[1]](sys.argv[2])
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[sys.argv[1]] = figures | {"model": Path(sys.argv[2]).name, "machine": before | {"load_after": machine()["load"]}}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
