"""`fathom lab`: what the report claims, recomputed."""

from pathlib import Path
from typing import Annotated, Optional

import typer

from fathom.cli.options import OutOption, SetOption

lab = typer.Typer(help="Recompute what the report claims.", no_args_is_help=True, rich_markup_mode=None)


@lab.command("cost", epilog="Example:  fathom lab cost --out cost.json")
def lab_cost(out: OutOption = None) -> None:
    """FLOPs of a token and bytes of the cache against context: V4, V3.2, V2 and Llama; the report's figures; small models measured."""
    from rich.console import Console

    from fathom.lab.cost_report import run_cost

    raise typer.Exit(0 if run_cost(out, Console()) else 1)


@lab.command("price", epilog="Example:  fathom lab price --turns 10 --prompt 20000 --answer 800 --hour 2.5 --read 9000 --write 1500")
def lab_price(conversations: Annotated[int, typer.Option(help="How many conversations.")] = 1000,
              turns: Annotated[int, typer.Option(help="Turns of each.")] = 5,
              prompt: Annotated[int, typer.Option(help="Tokens of the first prompt.")] = 4000,
              message: Annotated[int, typer.Option(help="Tokens of each further message.")] = 200,
              answer: Annotated[int, typer.Option(help="Tokens of each answer, reasoning included.")] = 600,
              shared: Annotated[int, typer.Option(help="Tokens of the first prompt that the cache holds already.")] = 0,
              prices: Annotated[Optional[Path], typer.Option(help="A price table of your own; default: DeepSeek's lists.")] = None,
              hour: Annotated[Optional[float], typer.Option(help="USD an hour of hardware of your own.")] = None,
              read: Annotated[Optional[float], typer.Option(help="Its measured tokens/s of reading prompts.")] = None,
              write: Annotated[Optional[float], typer.Option(help="Its measured tokens/s of writing.")] = None) -> None:
    """What conversations cost by dated price lists, and on hardware of one's own."""
    from rich.console import Console

    from fathom.lab.price import Workload, run_price

    workload = Workload(conversations, turns, prompt, message, answer, shared)
    run_price(workload, prices, hour, read, write, Console())


@lab.command("run", epilog="Example:  fathom lab run list   or   fathom lab run muon --jobs 2   or   fathom lab run all")
def lab_run(name: Annotated[str, typer.Argument(metavar="NAME|all|list", help="An experiment.")],
            jobs: Annotated[int, typer.Option(help="Runs at a time, each with one thread.")] = 2,
            out: Annotated[Path, typer.Option(help="Folder of the runs; those finished are kept.")] = Path("runs/lab"),
            recipe: Annotated[Path, typer.Option(help="The base that variants change.")] = Path("recipes/lab.toml"),
            set_: SetOption = None) -> None:
    """Train the variants of an experiment and judge its claim. Ctrl-C saves and stops; the same command goes on."""
    from rich.console import Console

    from fathom.lab.claims import run_experiments, show_list

    if name == "list":
        show_list(Console())
    else:
        run_experiments(name, out, recipe, set_ or [], jobs, Console())


@lab.command("report", epilog="Example:  fathom lab report --out docs/claims")
def lab_report(runs: Annotated[Path, typer.Option(help="Folder of `fathom lab run`.")] = Path("runs/lab"),
               out: Annotated[Path, typer.Option(help="Folder to write.")] = Path("docs/claims")) -> None:
    """Write all claims with verdicts, plots and commands as one HTML page and as Markdown."""
    from rich.console import Console

    from fathom.lab.claims_page import write_report

    write_report(runs, out, Console())
