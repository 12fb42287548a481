"""The command line: the verbs that are no group, and the way in."""

import os
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from fathom.cli.align import align
from fathom.cli.bench import bench
from fathom.cli.lab import lab
from fathom.cli.data import data
from fathom.cli.options import (
    DeviceOption,
    DryRunOption,
    DtypeOption,
    LengthsOption,
    ModelArgument,
    PackedOption,
    RecipeArgument,
    ResumeOption,
    SeedOption,
    SetOption,
    TemperatureOption,
    TopPOption,
    TrainingDeviceOption,
)
from fathom.errors import FathomError, RecipeError

app = typer.Typer(name="fathom", help="The open, complete DeepSeek-V4 system: train it, talk to it, check it.",
                  no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False,
                  context_settings={"help_option_names": ["-h", "--help"]}, rich_markup_mode=None)
app.add_typer(bench, name="bench")
app.add_typer(lab, name="lab")
app.add_typer(data, name="data")
app.registered_commands += align.registered_commands


@app.command(epilog="Example:  fathom train recipes/tiny.toml --set minutes=1 --set run=runs/first   or   fathom train recipes/flash.toml --dry-run")
def train(recipe: RecipeArgument, set_: SetOption = None, resume: ResumeOption = False, dry: DryRunOption = False,
          device: TrainingDeviceOption = "auto") -> None:
    """Pre-train a model from a recipe. Ctrl-C saves and stops; --resume continues the same curve."""
    from rich.console import Console

    from fathom.recipe import load
    from fathom.train.pretrain import Pretrain, dry_run, pretrain

    console, loaded = Console(quiet=os.environ.get("RANK", "0") != "0"), load(Pretrain, recipe, set_ or [])  # of many the first one talks
    if dry:
        dry_run(loaded, recipe.parent, console)
        return
    run = pretrain(loaded, recipe.parent, resume, console, device)
    console.print(f"done: {run}  (talk to it: fathom generate {run} --prompt ...)", soft_wrap=True)


@app.command(epilog="Example:  fathom report runs/tiny   or   fathom report runs/muon --beside runs/adamw --beside runs/gqa")
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a run.")],
           out: Annotated[Optional[Path], typer.Option("--out", help="The page to write; default: report.html in the run.")] = None,
           beside: Annotated[Optional[list[Path]], typer.Option("--beside", metavar="RUN", help="Compare with this run; may be repeated.")] = None) -> None:
    """Make one HTML page of a run: curves, layers, expert load, samples over time, recipe and machine."""
    from rich.console import Console

    from fathom.train.report import write_report

    Console().print(f"done: {write_report(run, out, beside or ())}", soft_wrap=True)


@app.command(epilog="Example:  fathom generate runs/tiny --prompt 'It is a truth' --max-tokens 80 --seed 1")
def generate(path: ModelArgument, prompt: Annotated[str, typer.Option(help="The text to continue.")],
             max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest continuation.")] = 128,
             temperature: TemperatureOption = 1.0, top_p: TopPOption = 1.0, seed: SeedOption = None,
             dtype: DtypeOption = "float32", device: DeviceOption = "cpu", packed: PackedOption = False,
             special: Annotated[bool, typer.Option("--special", help="Read special tokens in the prompt.")] = False) -> None:
    """Continue a text, streamed as it is written."""
    from fathom.engine.engine import Engine, dtype_of
    from fathom.engine.sampler import Sampling

    sampling = Sampling(temperature, top_p, seed, max_tokens)
    engine = Engine.load(path, dtype_of(dtype), device, packed)
    sys.stdout.write(prompt)
    for piece in engine.text(prompt, sampling, special):
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command(epilog="Example:  fathom chat runs/tiny-chat --think off --message 'What is 3 + 4?'")
def chat(path: ModelArgument,
         think: Annotated[str, typer.Option(help="off, high or max.")] = "high",
         system: Annotated[Optional[str], typer.Option(help="A system message.")] = None,
         message: Annotated[Optional[str], typer.Option(help="Ask this one question and leave.")] = None,
         max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest answer.")] = 512,
         temperature: TemperatureOption = 1.0, top_p: TopPOption = 1.0, seed: SeedOption = None,
         dtype: DtypeOption = "float32", device: DeviceOption = "cpu", packed: PackedOption = False) -> None:
    """Talk to a model in the terminal. Inside: /think off|high|max, /new, /quit; Ctrl-C stops an answer."""
    from fathom.engine.chat_session import ChatSession, converse
    from fathom.engine.engine import Engine, dtype_of
    from fathom.engine.sampler import Sampling

    engine = Engine.load(path, dtype_of(dtype), device, packed)
    session = ChatSession(engine, Sampling(temperature, top_p, seed, max_tokens), think, system)
    converse(session, message)


@app.command(epilog="Example:  fathom serve runs/tiny-chat --port 8000   or   fathom serve runs/tiny-chat --disk-cache kv --api-key-file keys")
def serve(path: Annotated[Optional[Path], typer.Argument(
              metavar="[PATH]", help="A model folder, or a run; default: the model of make demo.")] = None,
          host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 is every address of this machine.")] = "127.0.0.1",
          port: Annotated[int, typer.Option(help="0 takes a free one.")] = 8000,
          name: Annotated[Optional[str], typer.Option(help="The model's name in the API; default: the folder's.")] = None,
          api_key_file: Annotated[Optional[Path], typer.Option(
              "--api-key-file", help="Keys that are let in, one a line; without: FATHOM_API_KEY, or everyone.")] = None,
          dtype: DtypeOption = "float32", device: DeviceOption = "cpu", packed: PackedOption = False,
          cache_gib: Annotated[float, typer.Option("--cache-gib", help="Memory for all requests' and prefixes' cache.")] = 1.0,
          disk_cache: Annotated[Optional[Path], typer.Option("--disk-cache", help="Folder that keeps prefixes between runs.")] = None,
          disk_gib: Annotated[float, typer.Option("--disk-gib", help="Size of that folder at most.")] = 8.0,
          window: Annotated[str, typer.Option(help="Window states in the prefix cache: full, periodic or zero.")] = "periodic",
          drafts: Annotated[int, typer.Option(help="Tokens that the MTP block proposes at a time; 0: none.")] = 0,
          graphs: Annotated[bool | None, typer.Option("--graphs/--no-graphs", help="Decode as recorded steps: CUDA graphs, or on a CPU (default) tapes.")] = None,
          running: Annotated[int, typer.Option(help="Requests computed at the same time.")] = 64,
          waiting: Annotated[int, typer.Option(help="Requests that may wait; more get 429.")] = 256,
          drain: Annotated[float, typer.Option(help="Seconds for running requests when stopped.")] = 30.0,
          replicas: Annotated[int, typer.Option(help="Processes that compute, as Ray Serve deployments; 1: without Ray.")] = 1) -> None:
    """Serve a model: OpenAI's and Anthropic's API, a chat page at /, metrics. Ctrl-C finishes what runs, then stops."""
    import importlib.util

    if any(importlib.util.find_spec(package) is None for package in ("fastapi", "uvicorn", "httptools", "prometheus_client")):
        raise FathomError("serving needs more packages; run: pip install 'fathom[serve]'")
    from rich.console import Console

    from fathom.engine.engine import dtype_of
    from fathom.engine.settings import EngineSettings
    from fathom.server.launch import choose, launch

    settings = EngineSettings(cache_bytes=int(cache_gib * 2**30), running=running, waiting=waiting, window=window, disk=disk_cache,
                              disk_bytes=int(disk_gib * 2**30), drafts=drafts, graphs=graphs)
    if replicas == 1:
        launch(path, dtype_of(dtype), device, packed, settings, host, port, name, api_key_file, drain, Console(stderr=True))
        return
    if importlib.util.find_spec("ray") is None:
        raise FathomError("--replicas needs Ray; run: pip install 'fathom[ray]'")
    from fathom.server.replicas import Plan, launch_replicas

    path, server = choose(path, name, api_key_file, drain)
    launch_replicas(replicas, Plan(path.resolve(), dtype_of(dtype), device, packed, settings, server), host, port, Console(stderr=True))


@app.command(epilog="Example:  fathom explain runs/tiny --text 'It is a truth' --out explain.html")
def explain(path: Annotated[Optional[Path], typer.Argument(
                metavar="[PATH]", help="A model folder, or a run; default: a small model of random weights.")] = None,
            text: Annotated[Optional[str], typer.Option(help="What the model reads; default: a page of Jane Austen.")] = None,
            out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("explain.html"),
            seed: Annotated[int, typer.Option(help="Of the random weights.")] = 0) -> None:
    """One token's journey through the model, as a page to step through: streams, window, entries, experts, next token."""
    from rich.console import Console

    from fathom.lab.explain.run import explain as write_page

    write_page(path, text, out, seed, Console())


@app.command("eval", epilog="Example:  fathom eval runs/tiny   or   fathom eval runs/tiny-chat --questions 80   or   fathom eval runs/tiny --needles")
def evaluate(path: ModelArgument,
             questions: Annotated[int, typer.Option(help="Ask so many held-out questions instead.")] = 0,
             think: Annotated[str, typer.Option(help="off or high, for questions.")] = "off",
             length: Annotated[int, typer.Option(help="Tokens of context for held-out text.")] = 256,
             needles: Annotated[bool, typer.Option("--needles", help="Ask for facts in long texts instead, by length and depth.")] = False,
             lengths: LengthsOption = "512,1024,2048,4096,8192") -> None:
    """Measure a run: held-out bits per byte beside gzip, xz and n-grams, answers to checked questions, or needle retrieval."""
    from rich.console import Console

    from fathom.evals.compare import compare
    from fathom.evals.retrieval import Needles, evaluate_needles
    from fathom.evals.tasks import evaluate_questions

    if needles:
        evaluate_needles(path, Needles.of_lengths(lengths), Console())
    elif questions:
        evaluate_questions(path, questions, think, Console())
    else:
        compare(path, length, Console())


@app.command(epilog="Example:  fathom info flash   or   fathom info runs/tiny")
def info(model: Annotated[str, typer.Argument(metavar="PATH|PRESET",
                                              help="A model folder, a run, or tiny, nano, flash, pro.")],
         context: Annotated[int, typer.Option(help="Context length for the cost of one token.")] = 0) -> None:
    """Describe a model: parameters, layer schedule, cache bytes and FLOPs per token."""
    from rich.console import Console

    from fathom.checkpoint.describe import describe

    Console().print(describe(model, context or None))


@app.command(epilog="Example:  fathom convert runs/tiny-chat tiny-fp4 --to official-fp4")
def convert(source: Annotated[str, typer.Argument(metavar="SRC", help="A model folder, or a run.")],
            target: Annotated[Path, typer.Argument(metavar="DST", help="The folder to make.")],
            to: Annotated[str, typer.Option(help="official-fp4, official-fp8, bf16 or fp32.")]) -> None:
    """Write a model in another number format, for Fathom and for others. Stopped, the same command goes on."""
    from rich.console import Console

    from fathom.checkpoint import convert as conversion

    console = Console()
    folder = conversion.convert(source, target, to, console)
    console.print(f"done: {folder}  (look inside: fathom inspect {folder})", soft_wrap=True)


@app.command(epilog="Example:  fathom inspect tiny-fp4 --reference runs/tiny-chat   or   fathom inspect flash")
def inspect(model: Annotated[str, typer.Argument(metavar="PATH|PRESET", help="A model folder, a run, or a preset.")],
            reference: Annotated[Optional[str], typer.Option(help="The same model, to measure errors against.")] = None,
            layout: Annotated[str, typer.Option(help="For a preset: the layout to list.")] = "official-fp4",
            listing: Annotated[Optional[Path], typer.Option(help="Write all names, dtypes, shapes to this JSON.")] = None) -> None:
    """What lies in a model folder: formats, counts, bytes, and the error of quantised weights."""
    from rich.console import Console

    from fathom.checkpoint.contents import inspect_model

    inspect_model(model, Console(), layout, reference, listing)


def main() -> None:
    """Run the command line; what a user caused is one line and exit code 2."""
    # Threads that wait for each other should soon sleep: beside another busy program, the default spinning made
    # training 20 times slower here; alone, it made no difference. Read when torch is first imported.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    try:
        app()
    except FathomError as error:
        sys.stdout.flush()
        alike = isinstance(error, RecipeError) and os.environ.get("RANK", "0") != "0"  # every process read the same recipe
        if not (error.told or alike):
            sys.stderr.write(f"fathom: {error}\n")
        sys.exit(2)
