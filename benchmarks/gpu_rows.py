"""Lines of what was measured on a GPU: required, aim, measured; printed as a table and written as JSON.

`pass` says whether `measured` is what `required` asks; a row without `required` informs only, and `pass` means nothing.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import provenance


@dataclass(frozen=True)
class Row:
    """One line of the table; without `required`, it informs only."""

    line: str
    required: str
    aim: str
    measured: str
    passed: bool
    details: dict[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """The row for other programs."""
        return {
            "line": self.line,
            "required": self.required,
            "aim": self.aim,
            "measured": self.measured,
            "pass": self.passed,
            "details": self.details,
        }


def at_least(line: str, required: float, aim: float | None, measured: float, unit: str = "x", **details: Any) -> Row:
    """A figure that must be `required` or more."""
    shown = f"{measured:.2f}{unit}" if unit == "x" else f"{measured:.0f}{unit}"
    return Row(
        line, f">= {required:g}{unit}", f"{aim:g}{unit}" if aim else "", shown, bool(measured >= required), details
    )


def at_most(line: str, required: float, aim: float | None, measured: float, unit: str, **details: Any) -> Row:
    """A figure that must be `required` or less."""
    shown = f"{measured:.2f}{unit}" if required >= 2 else f"{measured:.3f}{unit}"
    return Row(
        line, f"<= {required:g}{unit}", f"{aim:g}{unit}" if aim else "", shown, bool(measured <= required), details
    )


def information(line: str, measured: str, **details: Any) -> Row:
    """A figure that nothing is required of."""
    return Row(line, "", "", measured, True, details)


def print_rows(rows: Sequence[Row]) -> None:
    """The table."""
    print(f"\n{'':5}{'line':<84} {'required':<30} {'aim':<8} measured")
    for row in rows:
        mark = ("ok" if row.passed else "FAIL") if row.required else ""
        print(f"{mark:<5}{row.line:<84} {row.required:<30} {row.aim:<8} {row.measured}", flush=True)


def write_rows(file: Path, rows: Sequence[Row], command: str, commit: str = "") -> None:
    """What can be read later: the device, the commit, the versions, and every row. `commit` where there is no git."""
    found = provenance(command)
    content = {
        "device": found["device"].get("gpu", found["device"]["cpu"]),
        "commit": commit or found["commit"],
        "versions": {
            **found["versions"],
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        },
        "command": command,
        "rows": [row.as_json() for row in rows],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1) + "\n")
