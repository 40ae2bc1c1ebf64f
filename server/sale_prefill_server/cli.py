"""The server's commands: `sale-prefill serve` and `sale-prefill models`."""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sale_prefill_server.config import ENVIRONMENT_PREFIX, ConfigError, ServerConfig, load_config

if TYPE_CHECKING:
    from sale_prefill_server.models import CachedModel

EXIT_OK = 0
EXIT_ERROR = 1
EXIT_USAGE = 2


def add_serve_arguments(parser: argparse.ArgumentParser) -> None:
    """One flag a setting, from the schema in `config.py`."""
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML file of settings")
    for item in dataclasses.fields(ServerConfig):
        flag = "--" + item.name.replace("_", "-")
        text = f"{item.metadata['help']} (default {item.default!r}; ${ENVIRONMENT_PREFIX}{item.name.upper()})"
        if isinstance(item.default, bool):
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
        else:
            parser.add_argument(flag, metavar="X", default=None, help=text.replace("%", "%%"))


def run_serve(arguments: argparse.Namespace) -> int:
    """Runs a server until SIGINT or SIGTERM. Returns an exit status."""
    names = [item.name for item in dataclasses.fields(ServerConfig)]
    flags = {name: getattr(arguments, name) for name in names if getattr(arguments, name, None) is not None}
    try:
        config = load_config(flags, file=arguments.config)
    except ConfigError as error:
        print(f"sale-prefill serve: {error}", file=sys.stderr)
        return EXIT_USAGE
    from sale_prefill_server.observability.logging import set_up_logging

    set_up_logging(config.log_level)
    print(f"# settings of this server (TOML)\n{config.describe()}", file=sys.stderr, flush=True)
    return asyncio.run(_serve(config))


async def _serve(config: ServerConfig) -> int:
    from sale_prefill_server.app import PortInUseError, Server
    from sale_prefill_server.models import ModelError

    stopped = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped.set)
    server = Server(config)
    waiting = asyncio.create_task(stopped.wait())
    try:
        await server.start()
        loading = asyncio.create_task(server.wait_ready())
        await asyncio.wait({loading, waiting}, return_when=asyncio.FIRST_COMPLETED)
        if not loading.done():
            # Reading weights cannot be interrupted, and nothing is at stake yet.
            os._exit(EXIT_OK)
        await loading
        gc.collect()
        gc.freeze()  # looking through what libraries and model leave holds every thread up for tens of milliseconds
        metrics = f"http://{config.metrics_host}:{server.metrics_port}/metrics"
        print(f"sale-prefill ready: grpc {config.host}:{server.port} metrics {metrics}", flush=True)
        await waiting
    except (ConfigError, PortInUseError, ModelError) as error:
        print(f"sale-prefill serve: {error}", file=sys.stderr)
        return EXIT_ERROR
    finally:
        waiting.cancel()
        await server.stop()
    return EXIT_OK


def add_models_arguments(parser: argparse.ArgumentParser) -> None:
    """`list` (the default), `fetch NAME`, `remove NAME`."""
    parser.add_argument("action", nargs="?", choices=("list", "fetch", "remove"), default="list")
    parser.add_argument("name", nargs="?", help="model: the default's name, a .gguf file or a hub id")
    parser.add_argument("--cache-dir", type=Path, help="folder of fetched and converted models")
    if not any(action.dest == "json" for action in parser._actions):
        parser.add_argument("--json", action="store_true", help="print JSON")


def run_models(arguments: argparse.Namespace) -> int:
    """Lists, fetches or removes models in the cache. Returns an exit status."""
    from sale_prefill_server.models import DEFAULT_MODEL, ModelError, list_models, remove_model, resolve_model

    try:
        if arguments.action == "fetch":
            name = arguments.name or DEFAULT_MODEL
            source = resolve_model(name, arguments.cache_dir, lambda line: print(line, file=sys.stderr))
            print(json.dumps({"name": source.name, "path": str(source.path)}) if arguments.json else source.path)
        elif arguments.action == "remove":
            if not arguments.name:
                print("sale-prefill models remove: name the model to remove", file=sys.stderr)
                return EXIT_USAGE
            removed = remove_model(arguments.name, arguments.cache_dir)
            print(json.dumps({"name": removed.name}) if arguments.json else f"removed {removed.name}")
        else:
            _print_models(list_models(arguments.cache_dir), as_json=arguments.json)
    except ModelError as error:
        print(f"sale-prefill models: {error}", file=sys.stderr)
        return EXIT_ERROR
    return EXIT_OK


def _print_models(models: Sequence[CachedModel], *, as_json: bool) -> None:
    rows = [{key: str(value) for key, value in dataclasses.asdict(model).items()} for model in models]
    if as_json:
        print(json.dumps(rows))
    elif not rows:
        print("no models in the cache; `sale-prefill models fetch` gets the default one")
    for row in () if as_json else rows:
        print("  ".join(row.values()))
