"""What commands print: JSON documents and tables."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any


def plain(value: Any) -> Any:
    """A result as JSON has it: dataclasses as objects, bytes as hexadecimal text, instants as ISO 8601."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, bytes):
        return value.hex()
    return value.isoformat() if isinstance(value, datetime) else value


def write(text: str) -> None:
    """Write to standard output at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def note(text: str) -> None:
    """Write a line to standard error."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def write_json(value: Any) -> None:
    """Write one JSON document."""
    write(json.dumps(plain(value), ensure_ascii=False, indent=2) + "\n")


def write_facts(facts: Sequence[tuple[str, str]]) -> None:
    """Write names and values, one a line."""
    width = max(len(name) for name, _ in facts)
    write("".join(f"{name:<{width}}  {value}\n" for name, value in facts))


def write_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Write columns; the last one may be of any width."""
    widths = [max(len(row[column]) for row in (header, *rows)) for column in range(len(header))]
    for row in (header, *rows):
        cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)]
        write("  ".join(cells).rstrip() + "\n")


def size(num_bytes: float) -> str:
    """Bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def seconds(value: float | None) -> str:
    """Seconds for people; `-` where there are none."""
    return "-" if value is None else f"{value:.2f} s" if value < 10 else f"{value:.0f} s"
