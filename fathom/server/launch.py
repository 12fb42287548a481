"""From a path to a running server: the model, the keys, the logs."""

import logging
import os
import sys
from pathlib import Path

import torch
from rich.console import Console

from fathom.engine.remote import Plan, RemoteEngine
from fathom.engine.settings import EngineSettings
from fathom.errors import InputError
from fathom.server.app import ServerSettings, listen, serve

DEMO = Path("runs/tiny-chat")
KEY_VARIABLE = "FATHOM_API_KEY"


def launch(path: Path | None, dtype: torch.dtype, device: str, packed: bool, settings: EngineSettings, host: str, port: int, name: str | None,
           key_file: Path | None, drain_seconds: float, console: Console) -> None:
    """Load the model at `path`, by default the demo's, and serve it until a signal comes. One JSON line a request on stderr."""
    path, server_settings = choose(path, name, key_file, drain_seconds)
    # A core for the loop and its clients: on two cores 64 streams got 3 times as many tokens.
    threads = None if "OMP_NUM_THREADS" in os.environ else max(1, torch.get_num_threads() - 1)
    listener = listen(host, port)
    with console.status(f"loading {path} ..."):
        engine = RemoteEngine(Plan(path, dtype, device, packed, settings, threads))
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    _describe(engine, console)
    serve(engine, server_settings, listener, console)


def choose(path: Path | None, name: str | None, key_file: Path | None, drain_seconds: float) -> tuple[Path, ServerSettings]:
    """The model to serve, by default the demo's, and how; InputError where there is none."""
    if path is None and not DEMO.is_dir():
        raise InputError(f"no model given, and {DEMO} is not there; make one with `make demo` (about 10 minutes), or give a model folder")
    path = path or DEMO
    return path, ServerSettings(model_name=name or path.resolve().name, api_keys=read_keys(key_file), drain_seconds=drain_seconds)


def read_keys(path: Path | None) -> tuple[str, ...]:
    """API keys from a file, one a line, or the one in the environment; none: everyone is let in."""
    if path is None:
        return (os.environ[KEY_VARIABLE],) if os.environ.get(KEY_VARIABLE) else ()
    try:
        keys = tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read the API keys: {getattr(error, 'strerror', None) or error}") from error
    if not keys:
        raise InputError(f"{path} holds no API key; write one a line")
    return keys


def _describe(engine: RemoteEngine, console: Console) -> None:
    stats, settings = engine.stats(), engine.settings
    console.print(f"context up to {engine.max_tokens:,} tokens; cache for {stats.blocks * engine.block_tokens:,} tokens, "
                  f"{engine.slots} requests at a time" + (f"; prefixes kept in {settings.disk}" if settings.disk else ""),
                  soft_wrap=True, highlight=False, markup=False)
