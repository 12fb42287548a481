"""Post-training: `fathom sft`, `grpo`, `distill`, `average`, `score`, `pipeline`."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Optional

import typer

from fathom.cli.options import RecipeArgument, ResumeOption, SetOption, TrainingDeviceOption

align = typer.Typer(rich_markup_mode=None)
WorkersOption = Annotated[Optional[int], typer.Option("--workers", help="Ray actors that sample the rollouts (extra: ray); default: this process.")]


@contextmanager
def _player(workers: Optional[int]) -> Iterator[Callable]:
    """What plays rollouts: this process, or Ray actors until the end of the block."""
    from fathom.align.rollout import play_here
    from fathom.errors import InputError

    if workers is None:
        yield play_here
        return
    try:
        from fathom.align.ray_rollout import RayPlay
    except ModuleNotFoundError as error:
        raise InputError(f"--workers needs {error.name}; install it with: pip install 'fathom[ray]'") from None
    player = RayPlay(workers)
    try:
        yield player
    finally:
        player.close()


@align.command(epilog="Example:  fathom sft recipes/tiny-chat.toml --set base=runs/first")
def sft(recipe: RecipeArgument, set_: SetOption = None, resume: ResumeOption = False, device: TrainingDeviceOption = "auto") -> None:
    """Fine-tune a model on conversations. Ctrl-C saves and stops; --resume continues the same curve."""
    from rich.console import Console

    from fathom.align.domains import Domains
    from fathom.align.sft import Sft, fine_tune
    from fathom.recipe import load

    console = Console(quiet=os.environ.get("RANK", "0") != "0")  # of many the first one talks
    run = fine_tune(load(Sft, recipe, set_ or []), recipe.parent, resume, console, Domains(), device)
    console.print(f"done: {run}  (talk to it: fathom chat {run})", soft_wrap=True)


@align.command(epilog="Example:  fathom grpo recipes/pipeline/grpo.toml --set base=runs/tiny-chat --set run=runs/tiny-math")
def grpo(recipe: RecipeArgument, set_: SetOption = None, resume: ResumeOption = False, workers: WorkersOption = None,
         device: TrainingDeviceOption = "auto") -> None:
    """Reinforce a model on tasks whose answers a program checks. Ctrl-C saves and stops; --resume continues, even inside a round."""
    from rich.console import Console

    from fathom.align.domains import Domains
    from fathom.align.grpo import Grpo, reinforce
    from fathom.recipe import load

    console = Console()
    with _player(workers) as play:
        run = reinforce(load(Grpo, recipe, set_ or []), Domains(), resume, console, play, device)
    console.print(f"done: {run}  (measure it: fathom score {run} --environment math)", soft_wrap=True)


@align.command(epilog="Example:  fathom distill recipes/pipeline/distill.toml --set base=runs/tiny-chat --set run=runs/student")
def distill(recipe: RecipeArgument, set_: SetOption = None, resume: ResumeOption = False, workers: WorkersOption = None,
            device: TrainingDeviceOption = "auto") -> None:
    """Make one student of several teachers, on its own samples. Ctrl-C saves and stops; --resume continues, even inside a round."""
    from rich.console import Console

    from fathom.align.distill import Distill
    from fathom.align.distill import distill as run_distillation
    from fathom.align.domains import Domains
    from fathom.recipe import load

    console = Console()
    with _player(workers) as play:
        run = run_distillation(load(Distill, recipe, set_ or []), Domains(), resume, console, play, device)
    console.print(f"done: {run}  (talk to it: fathom chat {run})", soft_wrap=True)


@align.command(epilog="Example:  fathom average runs/math runs/code --out averaged")
def average(paths: Annotated[list[str], typer.Argument(metavar="PATH PATH...", help="Model folders or runs, of one shape.")],
            out: Annotated[Path, typer.Option(help="The folder to make.")]) -> None:
    """The mean of several models' weights, as a model: what distillation is compared with."""
    from fathom.align.distill import average as average_models

    print(f"done: {average_models(paths, out)}")


@align.command(epilog="Example:  fathom score runs/student --environment math,code --tasks 50 --mode chat,high --budgets 16,64")
def score(path: Annotated[Path, typer.Argument(metavar="PATH", help="A model folder, or a run.")],
          environment: Annotated[str, typer.Option(metavar="NAME,NAME", help="math, code, agent, instructions.")],
          tasks: Annotated[int, typer.Option(help="Held-out tasks of each environment.")] = 50,
          mode: Annotated[str, typer.Option(metavar="MODE,MODE", help="chat, high, max.")] = "high",
          levels: Annotated[str, typer.Option(metavar="N,N", help="Difficulties, in equal parts.")] = "1",
          budgets: Annotated[str, typer.Option(metavar="N,N", help="Also with the reasoning of a turn ended after so many tokens.")] = "",
          max_tokens: Annotated[int, typer.Option("--max-tokens", help="Longest episode.")] = 512,
          temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
          seed: Annotated[int, typer.Option(help="Of tasks and sampling.")] = 0,
          out: Annotated[Optional[Path], typer.Option(help="Write the rows to this JSON file.")] = None) -> None:
    """Ask held-out tasks in each mode: score, length, validity; with budgets, accuracy against thinking."""
    from fathom.align.scores import score_command

    score_command(path, environment, tasks, mode, levels, budgets, max_tokens, temperature, seed, out)


@align.command(epilog="Example:  fathom pipeline recipes/pipeline/pipeline.toml   (stopped, the same command goes on)")
def pipeline(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Base, specialists, one student, comparisons, scores and a report, two stages at a time. The same command goes on after a stop."""
    from rich.console import Console

    from fathom.align.domains import Domains
    from fathom.align.pipeline import Pipeline, run_pipeline
    from fathom.align.pipeline_report import write_report
    from fathom.recipe import load

    console = Console()
    page = run_pipeline(load(Pipeline, recipe, set_ or []), recipe.parent, Domains(), write_report, console)
    console.print(f"done: {page}", soft_wrap=True)
