"""Required against measured, line by line: what every `make check-…` prints and writes."""

from __future__ import annotations

import json
import platform
import subprocess
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


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
        import torch
        import transformers

        failed = [line.line for line in self._lines if not line.passed]
        content = {
            "command": command,
            "commit": _git("rev-parse", "HEAD"),
            "uncommitted_changes": bool(_git("status", "--porcelain", "--untracked-files=no")),
            "device": {"cpu": _cpu_name(), "threads": torch.get_num_threads()},
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "transformers": transformers.__version__,
            },
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


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()
