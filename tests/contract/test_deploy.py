"""What lies in deploy/ is accepted by the program that it is for."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not installed (Debian package prometheus)")
def test_prometheus_accepts_its_scrape_configuration() -> None:
    file = REPOSITORY / "deploy" / "prometheus" / "prometheus.yml"
    result = subprocess.run(["promtool", "check", "config", file], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_prometheus_scrapes_the_servers_default_metrics_port() -> None:
    from sale_prefill_server.config import ServerConfig

    text = (REPOSITORY / "deploy" / "prometheus" / "prometheus.yml").read_text()
    assert f'"127.0.0.1:{ServerConfig().metrics_port}"' in text
