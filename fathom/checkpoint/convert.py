"""From any layout to any other, shard by shard: whole files or none, resumable, the source untouched.

Shards are made in a hidden folder beside the target, `.NAME.converting`, which takes the target's name when it is complete. What a
kill, Ctrl-C or a full disk leaves there are whole shards with their checksums; the same command goes on from them.
"""

import json
import os
import shutil
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from fathom.checkpoint.layouts import LAYOUTS, Layout, Stored, config_for, encode, is_quantised, meta_model, stored_parts
from fathom.checkpoint.names import places
from fathom.checkpoint.released import SHARD_BYTES, write_configs
from fathom.checkpoint.shards import plan_shards, shard_names, write_index, write_shard
from fathom.checkpoint.training import find_model
from fathom.checkpoint.weights import Weights
from fathom.errors import CheckpointError, InputError
from fathom.files import sha256, sync, write_text
from fathom.quant.formats import TILE

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
_PROGRESS = "progress.json"


def convert(source: str | Path, target: str | Path, layout: Layout, console: Console, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write the model of `source` (a folder, or a run's newest checkpoint) to the new folder `target` in `layout`.

    The result is what other programs read: config.json, generation_config.json, tokenizer files, shards and their index, with
    checksums in its metadata. Raises InputError or CheckpointError.
    """
    if layout not in LAYOUTS:
        raise InputError(f"unknown layout {layout!r}; allowed: {', '.join(LAYOUTS)}")
    source, target = find_model(source), Path(target)
    if target.exists():
        raise CheckpointError(f"{target} exists already; name a new folder")
    weights = Weights(source)
    units = _units(weights, layout)
    weights.shards.verify()
    partial = target.with_name(f".{target.name}.converting")
    try:
        plan = plan_shards(units, shard_bytes)
        checksums = _write_shards(weights, plan, layout, partial, console)
        write_configs(config_for(weights.config, layout), partial)
        for file in TOKENIZER_FILES:
            if (source / file).is_file():
                shutil.copyfile(source / file, partial / file)
        write_index(partial, plan, list(checksums), checksums)
        (partial / _PROGRESS).unlink()
        for file in [*partial.iterdir(), partial]:
            sync(file)
        os.replace(partial, target)
        sync(target.parent)
    except OSError as error:
        raise CheckpointError(f"cannot write {target}: {error.strerror or error}; nothing half-written is left, finished shards wait "
                              f"in {partial}: run the same command again, or delete it") from error
    except KeyboardInterrupt:
        console.print(f"stopped; finished shards wait in {partial}: the same command goes on", soft_wrap=True)
        raise
    _remark(units, layout, console)
    return target


def _units(weights: Weights, layout: Layout) -> list[dict[str, Stored]]:
    """What to write, weight by weight; the source is held against its config first."""
    found = places(meta_model(weights.config, weights.own_mtp_ends))
    weights.check(found)
    return [stored_parts(name, place.shape, layout, not place.tensor.is_floating_point())
            for name, place in found.items()]


def _write_shards(weights: Weights, plan: list[list[dict[str, Stored]]], layout: Layout, partial: Path,
                  console: Console) -> dict[str, str]:
    """Make every shard that is not there yet; the checksums of all by file name."""
    progress_file, work = partial / _PROGRESS, _describe(weights, layout, plan)
    done = _finished(partial, work)
    if not done:
        shutil.rmtree(partial, ignore_errors=True)
    for file in partial.iterdir() if partial.is_dir() else ():  # what a kill left of a shard must not reach the target
        if file.name not in {*done, _PROGRESS}:
            file.unlink()
    sizes = [sum(stored.nbytes for unit in units for stored in unit.values()) for units in plan]
    files = shard_names(len(plan))
    partial.parent.mkdir(parents=True, exist_ok=True)
    missing = sum(size for file, size in zip(files, sizes, strict=True) if file not in done)
    if missing > (free := shutil.disk_usage(partial.parent).free):
        raise CheckpointError(f"{partial.parent} has {free / 1e6:,.1f} MB left and the conversion needs {missing / 1e6:,.1f} MB; make "
                              "room, or name a folder elsewhere")
    partial.mkdir(exist_ok=True)
    with Progress(TextColumn("{task.description}"), BarColumn(bar_width=24), DownloadColumn(), TransferSpeedColumn(),
                  TimeRemainingColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"to {layout}", total=sum(sizes))
        for file, units, size in zip(files, plan, sizes, strict=True):
            before = progress.tasks[0].completed
            if file not in done:

                def produce(name: str) -> dict[str, torch.Tensor]:
                    tensors = encode(name, weights.read(name), layout)
                    progress.advance(task, sum(tensor.nbytes for tensor in tensors.values()))
                    return tensors

                write_shard(partial, f"{file}.partial", units, produce)
                sync(partial / f"{file}.partial")
                os.replace(partial / f"{file}.partial", partial / file)
                done[file] = sha256(partial / file)
                write_text(progress_file, json.dumps({"work": work, "sha256": done}))
            progress.update(task, completed=before + size)
    return {file: done[file] for file in files}


def _describe(weights: Weights, layout: Layout, plan: list) -> dict:
    """What the finished shards depend on: the source's files as they are now, the layout, the number of shards."""
    files = {file: [(weights.folder / file).stat().st_size, (weights.folder / file).stat().st_mtime_ns]
             for file in sorted({*weights.shards.file_of.values(), "config.json"})}
    return {"source": str(weights.folder.resolve()), "files": files, "layout": layout, "shards": len(plan)}


def _finished(partial: Path, work: dict) -> dict[str, str]:
    """Shards of an earlier try at the same work that are still whole, with their checksums."""
    try:
        known = json.loads((partial / _PROGRESS).read_text(encoding="utf-8"))
        if known["work"] != work:
            return {}
        return {file: digest for file, digest in known["sha256"].items()
                if (partial / file).is_file() and sha256(partial / file) == digest}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def _remark(units: list[dict[str, Stored]], layout: Layout, console: Console) -> None:
    """Say so where the sizes make short tiles, which not every reader takes for what they are."""
    odd = [name for unit in units for name in list(unit)[:1] if is_quantised(name, layout)
           and any(size > TILE and size % TILE for size in unit[name].shape) and len(unit) == 2
           and unit[name].dtype != torch.int8]
    if odd:
        console.print(f"note: {len(odd)} FP8 weights have sizes that are no multiples of {TILE} (such as {odd[0]}); Fathom reads "
                      "their short tiles, transformers does not", soft_wrap=True)

