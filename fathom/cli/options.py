"""Arguments and options that several verbs share."""

from pathlib import Path
from typing import Annotated, Optional

import typer

SetOption = Annotated[Optional[list[str]], typer.Option(
    "--set", metavar="KEY=VALUE", help="Change a recipe field, such as schedule.steps=100. Repeatable.")]
ResumeOption = Annotated[bool, typer.Option("--resume", help="Continue the run from its newest checkpoint.")]
DryRunOption = Annotated[bool, typer.Option(
    "--dry-run", help="Only print the resolved recipe, its tokens, FLOPs, memory and duration (on the machine of its section plan).")]
RecipeArgument = Annotated[Path, typer.Argument(metavar="RECIPE.toml", help="The recipe.")]
ModelArgument = Annotated[Path, typer.Argument(
    metavar="PATH", help="A model folder, or a run (its newest checkpoint).")]
SeedOption = Annotated[Optional[int], typer.Option(help="Same seed, same text.")]
TemperatureOption = Annotated[float, typer.Option(help="0 is greedy.")]
DtypeOption = Annotated[str, typer.Option("--dtype", help="float32 or bfloat16.")]
TrainingDeviceOption = Annotated[str, typer.Option("--device", help="What computes: auto (the accelerator where there is one), cpu, cuda, cuda:1, xpu, ...")]
DeviceOption = Annotated[str, typer.Option("--device", help="What computes: cpu, cuda, cuda:1, xpu, ...")]
PackedOption = Annotated[bool, typer.Option(
    "--packed", help="Compute as released: FP8 and FP4 weights stay packed, the cache is in FP8 and FP4.")]
TopPOption = Annotated[float, typer.Option("--top-p", help="Keep the most likely tokens up to this share.")]
LengthsOption = Annotated[str, typer.Option("--lengths", metavar="N,N,...", help="Tokens of the prompt or the context.")]
ChunkOption = Annotated[Optional[int], typer.Option("--chunk", help="Tokens read at a time; default: as the engine does.")]
BatchOption = Annotated[int, typer.Option("--batch", help="Also so many rows, after the shortest context; 1: not.")]
MtpOption = Annotated[float, typer.Option("--mtp", help="Weight of the MTP loss, such as 0.3; 0: without MTP blocks.")]
BenchModelOption = Annotated[str, typer.Option("--model", help="bench-s, a preset, or a config.json; weights are random.")]
ThreadsOption = Annotated[Optional[int], typer.Option("--threads", help="Default: as many as torch takes.")]
RepeatsOption = Annotated[int, typer.Option("--repeats", help="Timed runs of each case; the median counts.")]
AgainstOption = Annotated[Optional[str], typer.Option(
    "--against", metavar="transformers", help="Measure each case with this program too, at its best setting.")]
PeerDtypeOption = Annotated[Optional[str], typer.Option("--peer-dtype", help="The other program's dtype; default: the same.")]
OutOption = Annotated[Optional[Path], typer.Option("--out", help="Keep the figures in this .json, a plot beside it.")]
BenchSeedOption = Annotated[int, typer.Option("--seed", help="Of weights and tokens.")]
