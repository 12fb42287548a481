"""`fathom bench`: speed and memory."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from fathom.cli.options import (
    AgainstOption,
    BatchOption,
    BenchModelOption,
    BenchSeedOption,
    ChunkOption,
    DeviceOption,
    DtypeOption,
    LengthsOption,
    MtpOption,
    OutOption,
    PeerDtypeOption,
    RepeatsOption,
    ThreadsOption,
)

bench = typer.Typer(help="Measure speed and memory.", no_args_is_help=True, rich_markup_mode=None)


@bench.command("prefill", epilog="Example:  fathom bench prefill --against transformers --out prefill.json")
def bench_prefill(lengths: LengthsOption = "2048,8192,32768", chunk: ChunkOption = None, model: BenchModelOption = "bench-s",
                  dtype: DtypeOption = "float32", threads: ThreadsOption = None, repeats: RepeatsOption = 3,
                  against: AgainstOption = None, peer_dtype: PeerDtypeOption = None, seed: BenchSeedOption = 0,
                  device: DeviceOption = "cpu", out: OutOption = None) -> None:
    """Reading prompts: tokens/s, memory, share of the machine's matrix products. A fresh process for each case."""
    from fathom.lab.bench.plan import Plan

    plan = Plan(model, dtype, threads, repeats, against, peer_dtype, seed, device)
    _bench(plan, plan.prefill(lengths, chunk), out)


@bench.command("decode", epilog="Example:  fathom bench decode --lengths 512,8192 --batch 8 --dtype bfloat16")
def bench_decode(lengths: LengthsOption = "512,8192,65536", batch: BatchOption = 8, model: BenchModelOption = "bench-s",
                 dtype: DtypeOption = "float32", threads: ThreadsOption = None, repeats: RepeatsOption = 3,
                 against: AgainstOption = None, peer_dtype: PeerDtypeOption = None, seed: BenchSeedOption = 0,
                 device: DeviceOption = "cpu", out: OutOption = None) -> None:
    """Writing after contexts: ms a token, tokens/s of a batch, share of the machine's memory bandwidth."""
    from fathom.lab.bench.plan import Plan

    plan = Plan(model, dtype, threads, repeats, against, peer_dtype, seed, device)
    _bench(plan, plan.decode(lengths, batch), out)


@bench.command("train", epilog="Example:  fathom bench train --tokens 2048,16384 --mtp 0.3")
def bench_train(tokens: Annotated[str, typer.Option(metavar="N,N,...", help="Tokens of the one row.")] = "2048",
                mtp: MtpOption = 0.0,
                optimizer: Annotated[str, typer.Option(metavar="muon|adamw", help="What moves our matrices; a peer has AdamW.")] = "muon",
                model: BenchModelOption = "bench-s", dtype: DtypeOption = "float32", threads: ThreadsOption = None,
                repeats: RepeatsOption = 3, against: AgainstOption = None, peer_dtype: PeerDtypeOption = None, seed: BenchSeedOption = 0, device: DeviceOption = "cpu", out: OutOption = None) -> None:
    """Whole training steps: losses, gradients, clipping, Muon and AdamW, or AdamW alone as the peer's."""
    from fathom.lab.bench.plan import Plan

    plan = Plan(model, dtype, threads, repeats, against, peer_dtype, seed, device)
    _bench(plan, plan.train(tokens, mtp, optimizer), out)


@bench.command("all", epilog="Example:  fathom bench all --against transformers --out bench.json")
def bench_all(model: BenchModelOption = "bench-s", dtype: DtypeOption = "float32", threads: ThreadsOption = None,
              repeats: RepeatsOption = 3, against: AgainstOption = None, peer_dtype: PeerDtypeOption = None,
              seed: BenchSeedOption = 0, device: DeviceOption = "cpu", out: OutOption = None) -> None:
    """Prefill, decode and train, each with its defaults. (A million tokens is a bench of its own.)"""
    from fathom.lab.bench.plan import Plan

    plan = Plan(model, dtype, threads, repeats, against, peer_dtype, seed, device)
    _bench(plan, plan.prefill("2048,8192,32768") + plan.decode("512,8192,65536", 8) + plan.train("2048"), out)


def _bench(plan: object, cases: list, out: Path | None) -> None:
    """Measure, print, and end with the exit code."""
    from rich.console import Console

    from fathom.lab.bench.run import bench as run

    raise typer.Exit(run(plan, cases, out, Console()))


@bench.command("million", epilog="Example:  fathom bench million --out million.json   or   fathom bench million --tokens 65536")
def bench_million(tokens: Annotated[int, typer.Option(help="How many tokens to read.")] = 1 << 20,
                  chunk: Annotated[int, typer.Option(help="Tokens read at a time.")] = 2048,
                  text: Annotated[Optional[str], typer.Option(help="A file, folder or package:NAME; default: six novels.")] = None,
                  model: Annotated[Optional[Path], typer.Option(help="A model folder or run; default: a small random one.")] = None,
                  dtype: DtypeOption = "float32",
                  fact_tokens: Annotated[int, typer.Option("--fact-tokens", help="Context to plant facts in; 0: none.")] = 65536,
                  full_facts: Annotated[bool, typer.Option("--full-facts", help="Plant one in the whole text, too.")] = False,
                  seed: Annotated[int, typer.Option(help="Of random weights and of the order of repeated text.")] = 0,
                  out: OutOption = None) -> None:
    """Read a million tokens: time, memory, cache and decoding on the way; facts that reach the end. Ctrl-C shows what there is."""
    from rich.console import Console

    from fathom.lab.million import Settings, run_million

    settings = Settings(tokens, chunk, text, model, dtype, seed, fact_tokens, full_facts)
    if not run_million(settings, out, Console())["complete"]:
        raise typer.Exit(130)
