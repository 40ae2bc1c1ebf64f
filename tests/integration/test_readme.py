"""The README's client example runs as it is written, against a real server of the default model."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from tests.support import running_server

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_client_example_runs_as_written() -> None:
    found = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert found is not None
    with running_server(model="smollm2-135m-instruct", kv_memory="2G") as server:
        # Only the port differs: the test's server takes a free one.
        example = found[1].replace("127.0.0.1:50051", server.target)
        run = subprocess.run([sys.executable, "-c", example], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert re.match(r"\d+ tokens in \d+\.\d s\n", run.stdout)
    assert len(run.stdout.splitlines()[1]) > 1
