"""Without the extras the client works on token ids, and what needs an extra says which."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

BLOCKED = ("torch", "transformers", "tokenizers", "jinja2", "safetensors", "grpc_health", "prometheus_client")


def run_without_extras(code: str) -> str:
    """Output of `code` in an interpreter that cannot import the extras."""
    prelude = f"import sys\nfor name in {BLOCKED!r}: sys.modules[name] = None\n"
    outcome = subprocess.run(
        [sys.executable, "-c", prelude + textwrap.dedent(code)], capture_output=True, text=True, check=False
    )
    assert outcome.returncode == 0, outcome.stderr
    return outcome.stdout


def test_the_package_and_its_command_line_import_without_extras() -> None:
    output = run_without_extras("""
        import sale_prefill_client
        from sale_prefill_client import cli
        try:
            cli.main(["--help"])
        except SystemExit as end:
            print(end.code)
    """)
    assert output.strip().endswith("0")


@pytest.mark.parametrize(
    ("code", "extra"),
    [
        ("from sale_prefill_client import Tokenizer; Tokenizer('/nowhere')", "text"),
        (
            "from sale_prefill_client.chat_template import render; "
            "render('', [], add_generation_prompt=False, variables={})",
            "text",
        ),
        ("from sale_prefill_client.kv import KvCache; KvCache('', None, 0, 1, 0, 1, 1, b'', None).torch()", "torch"),
    ],
)
def test_a_missing_extra_is_named_with_the_command_that_adds_it(code: str, extra: str) -> None:
    output = run_without_extras(f"""
        from sale_prefill_client import MissingExtraError
        try:
            {code}
        except MissingExtraError as error:
            print(error)
    """)
    assert f"pip install 'sale-prefill[{extra}]'" in output


def test_serve_without_the_server_extra_says_what_to_install() -> None:
    output = run_without_extras("""
        import sys
        sys.stderr = sys.stdout
        from sale_prefill_client import cli
        print(cli.main(["serve", "--port", "0"]))
    """)
    assert "pip install 'sale-prefill[server]'" in output
    assert output.strip().endswith("1")
