"""`fathom data`: corpora."""

import typer

from fathom.cli.options import RecipeArgument, SetOption

data = typer.Typer(help="Corpora for pre-training.", no_args_is_help=True)


@data.command(epilog="Example:  fathom data prepare recipes/corpus-python.toml --set out=corpora/python")
def prepare(recipe: RecipeArgument, set_: SetOption = None) -> None:
    """Make a corpus from a recipe: filtered, without duplicates, tokenised, with a manifest. Stopped, the same command goes on."""
    from rich.console import Console

    from fathom.data import prepare as preparation
    from fathom.data.corpus_report import describe
    from fathom.recipe import load

    console = Console()
    out = preparation.prepare(load(preparation.Prepare, recipe, set_ or []), recipe.parent, console)
    describe(out, console)
    console.print(f"done: {out}  (train on it: data.prepared = \"{out}\")", soft_wrap=True)
