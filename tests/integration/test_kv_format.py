"""The example in docs/kv-format.md runs as it is written."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from sale_prefill_client import Client
from tests.support import RunningServer, tokens_of

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "kv-format.md"
CHECK = """
for layer, cache in zip(range(kv.layer_start, kv.layer_end), caches):
    for kind, source in enumerate(kv.layer(layer)):
        for token in (0, 17, kv.num_tokens - 1):
            block, offset = block_table[token // block_size], token % block_size
            assert torch.equal(cache[kind, block, offset], source[token])
"""


def test_the_paged_example_runs_as_written(tiny_server: RunningServer, tmp_path: Path) -> None:
    found = re.search(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    assert found is not None
    with Client(tiny_server.target) as client:
        client.pull_kv(client.prefill(tokens_of(100)).session_id).save(tmp_path / "kv.safetensors")
    command = [sys.executable, "-c", found[1] + CHECK]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "2 layers of 100 tokens in 7 blocks\n"
