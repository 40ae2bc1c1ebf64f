"""Required against measured, line by line: what every `make check-…` prints and writes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
#: Instructions that attention on a CPU depends on, as Linux names them.
CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_int8", "amx_bf16")
#: Average number of running processes, over the last minute, from which a machine is not idle.
BUSY_LOAD = 0.5


@dataclass(frozen=True)
class Line:
    """One promise: what is required, what was measured, whether that holds, and what else is worth knowing."""

    line: str
    required: str
    measured: str
    passed: bool
    details: dict[str, Any] = field(default_factory=dict)


class Report:
    """Collects lines, prints each as it comes, and writes them all as JSON."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._lines: list[Line] = []
        self._started = time.time()
        print(f"{'':5}{'line':<74} {'required':<26} measured", flush=True)

    def add(self, line: str, required: str, measured: str, passed: bool, **details: Any) -> None:
        """Records and prints one line."""
        self._lines.append(Line(line, required, measured, bool(passed), details))
        print(f"{'ok' if passed else 'FAIL':<5}{line:<74} {required:<26} {measured}", flush=True)

    def finish(self, command: str) -> int:
        """Writes benchmarks/results/<name>.json. Returns 0 where every line holds, else 1."""
        failed = [line.line for line in self._lines if not line.passed]
        content = {
            **provenance(command),
            "duration_seconds": round(time.time() - self._started, 1),
            "rows": [asdict(line) for line in self._lines],
        }
        file = ROOT / "benchmarks" / "results" / f"{self._name}.json"
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content, indent=1) + "\n")
        print(
            f"\n{len(self._lines) - len(failed)} of {len(self._lines)} lines hold; written to {file.relative_to(ROOT)}"
        )
        return 1 if failed else 0


def provenance(command: str) -> dict[str, Any]:
    """What a figure must be read with: the command that made it, the commit, the device, the versions."""
    import torch
    import transformers

    device: dict[str, Any] = {"cpu": _cpu_name(), "cpu_features": cpu_features(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        device["gpu"] = torch.cuda.get_device_name()
    return {
        "command": command,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "device": device,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def warn_if_busy() -> None:
    """Says so where something else runs on this machine: figures taken beside it mean little."""
    load = os.getloadavg()[0]
    if load > BUSY_LOAD:
        print(
            f"load average {load:.1f}: something else runs here, or did a minute ago; figures will scatter", flush=True
        )


def cpu_features() -> list[str]:
    """Those of `CPU_FEATURES` that this machine has; none where /proc/cpuinfo does not tell."""
    flags = set(_cpu_field("flags").split())
    return [name for name in CPU_FEATURES if name in flags]


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:  # a machine that only measures may have no git
        return ""


def _cpu_name() -> str:
    return _cpu_field("model name") or platform.processor()


def _cpu_field(name: str) -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(name)), "")
