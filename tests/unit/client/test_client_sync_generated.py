"""The blocking client is what the generator makes of the asyncio one."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from sale_prefill_client import AsyncClient, Client

SCRIPT = Path(__file__).parents[3] / "tools" / "generate_sync_client.py"


def test_generated_files_are_up_to_date() -> None:
    outcome = subprocess.run([sys.executable, str(SCRIPT), "--check"], capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr


def public_methods(client: type) -> dict[str, inspect.Signature]:
    members = inspect.getmembers(client, inspect.isfunction)
    return {name: inspect.signature(member) for name, member in members if not name.startswith("_")}


def test_both_clients_have_the_same_calls_with_the_same_arguments() -> None:
    blocking, asynchronous = public_methods(Client), public_methods(AsyncClient)
    assert blocking.keys() == asynchronous.keys()
    assert len(blocking) > 12
    for name, signature in blocking.items():
        assert signature.parameters == asynchronous[name].parameters, name


@pytest.mark.parametrize("client", [Client, AsyncClient])
def test_every_public_call_is_documented(client: type) -> None:
    assert [name for name in public_methods(client) if not inspect.getdoc(getattr(client, name))] == []
