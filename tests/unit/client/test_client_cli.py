"""The command line: what it reads, what it prints, and how it exits."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import pytest

from sale_prefill.v1 import prefill_service_pb2, server_service_pb2, session_service_pb2
from sale_prefill_client import cli
from sale_prefill_client.cli._main import build_parser
from tests.unit.client.scripted import (
    ACCEPTED,
    DECODE_ACCEPTED,
    DECODE_RESULT,
    RESULT,
    Script,
    decode_tokens,
    error_info,
    prefill_events,
    rich_status,
    scripted_server,
)
from tests.unit.client.test_client_tokenizer_files import sending
from tests.unit.client.texts import save_byte_tokenizer

COMMANDS = [["prefill"], ["decode"], ["sessions", "list"], ["sessions", "get"], ["sessions", "renew"]]
COMMANDS += [["sessions", "fork"], ["sessions", "delete"], ["pull"], ["push"], ["info"], ["serve"], ["models"]]


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SALE_PREFILL_TARGET", "SALE_PREFILL_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def tokenizer_files(tmp_path: Path) -> Any:
    folder = save_byte_tokenizer(tmp_path / "model")
    return sending({path.name: path.read_bytes() for path in sorted(folder.iterdir())})


def prefilling() -> Script:
    return Script([lambda _, __: iter(prefill_events(ACCEPTED, 4, RESULT))])


def decoding(*token_ids: int) -> Script:
    return Script([lambda _, __: iter([DECODE_ACCEPTED, *(decode_tokens(each) for each in token_ids), DECODE_RESULT])])


def failing(code: grpc.StatusCode, reason: str) -> Any:
    def handler(_: Any, context: grpc.ServicerContext) -> None:
        context.abort_with_status(rich_status(code, f"because of {reason}", error_info(reason)))

    return handler


class TestHelp:
    @pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
    def test_each_command_shows_an_example_and_the_exit_codes(
        self, words: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as end:
            cli.main([*words, "--help"])
        assert end.value.code == 0
        shown = capsys.readouterr().out
        assert f"example:\n  sale-prefill {' '.join(words)}" in shown
        assert "exit codes:" in shown

    def test_examples_parse(self) -> None:
        for words in (
            ["prefill", "report.txt", "--chat", "--lease", "10m"],
            ["decode", "SESSION", "--prompt", "And in one sentence?", "--chat", "--max-new-tokens", "64"],
            ["sessions", "renew", "SESSION", "--lease", "10m"],
            ["sessions", "fork", "SESSION"],
            ["pull", "SESSION", "--output", "kv.safetensors", "--layers", "0:4"],
            ["push", "kv.safetensors", "--session", "report", "--lease", "10m"],
            ["info", "--wait", "60s"],
            ["serve", "--model", "./my-model", "--port", "50051"],
            ["models", "list"],
        ):
            assert callable(build_parser(words[0]).parse_args(words).run)

    def test_the_servers_commands_load_nothing_unless_asked_for(self) -> None:
        code = "import sys; from sale_prefill_client import cli\n"
        code += "try: cli.main(['info', '--help'])\nexcept SystemExit: pass\n"
        code += "sys.exit(any(name.startswith(('sale_prefill_server', 'torch')) for name in sys.modules))"
        assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 0


class TestPrompt:
    @pytest.mark.parametrize("source", ["file", "stdin", "argument"])
    def test_token_ids_come_from_a_file_standard_input_or_an_argument(
        self, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "ids").write_text("1, 2\n3")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"1, 2\n3")))
        words = {"file": [str(tmp_path / "ids")], "stdin": ["-"], "argument": ["--prompt", "[1, 2, 3]"]}[source]
        script = prefilling()
        with scripted_server(Prefill=script) as target:
            assert cli.main(["prefill", *words, "--tokens", "--server", target]) == 0
        assert list(script.requests[0].token_ids) == [1, 2, 3]

    def test_text_goes_through_the_served_tokenizer(self, tokenizer_files: Any) -> None:
        script = prefilling()
        with scripted_server(Prefill=script, GetTokenizerFiles=tokenizer_files) as target:
            assert cli.main(["prefill", "--prompt", "hé", "--server", target]) == 0
            assert cli.main(["prefill", "--prompt", "hé", "--session", "s-1", "--server", target]) == 0
        new, appended = (list(request.token_ids) for request in script.requests)
        assert len(appended) == 3
        assert new[1:] == appended

    def test_a_chat_opens_with_the_templates_words(self, tokenizer_files: Any) -> None:
        script = prefilling()
        with scripted_server(Prefill=script, GetTokenizerFiles=tokenizer_files) as target:
            words = ["prefill", "--prompt", "hi", "--chat", "--system", "Be brief.", "--server", target]
            assert cli.main(words) == 0
        ids = script.requests[0].token_ids
        text = "<|start|>system\nBe brief.<|end|>\n<|start|>user\nhi<|end|>\n<|start|>assistant\n"
        assert len(ids) == len(text.replace("<|start|>", ".").replace("<|end|>", "."))

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["prefill"], "needs a prompt"),
            (["prefill", "x", "--prompt", "y"], "use one of them"),
            (["prefill", "--prompt", "1", "--tokens", "--chat"], "use one of them"),
            (["prefill", "--prompt", "one", "--tokens"], "entry 0 is 'one'"),
            (["prefill", "--prompt", "x", "--system", "y"], "add --chat"),
            (["prefill", "/no/such/file"], "cannot read /no/such/file"),
            (["decode", "s-1", "--chat"], "need a prompt"),
        ],
    )
    def test_wrong_usage_says_what_to_do(
        self, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert cli.main([*words, "--server", "127.0.0.1:1"]) == 2
        assert message in capsys.readouterr().err

    def test_a_file_that_is_no_text_is_named(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
        assert cli.main(["prefill", str(tmp_path / "binary")]) == 2
        assert "as UTF-8 text" in capsys.readouterr().err


class TestCommands:
    def test_prefill_sends_its_options(self) -> None:
        script = prefilling()
        words = "prefill --prompt 1 --tokens --session s-1 --expect-prefix 0 --lease 1.5m --sliding --label a=b=c"
        words += " --on-interrupt free --threshold 0.004 --query-stride 2 --top 3 --request-id r-1"
        with scripted_server(Prefill=script) as target:
            assert cli.main([*words.split(), "--server", target]) == 0
        request = script.requests[0]
        assert (request.session_id, request.request_id, request.expected_prefix_tokens) == ("s-1", "r-1", 0)
        assert request.HasField("expected_prefix_tokens")
        assert (request.retention.lease_duration.seconds, request.retention.sliding) == (90, True)
        assert dict(request.labels) == {"a": "b=c"}
        assert request.on_interrupt == prefill_service_pb2.INTERRUPT_POLICY_FREE
        assert request.attention.mode == session_service_pb2.ATTENTION_MODE_SALE
        assert (request.attention.threshold, request.attention.query_stride) == (0.004, 2)
        assert request.num_top_logits == 3

    def test_prefill_says_what_the_session_is_to_survive_and_whether_kv_is_reused(self) -> None:
        script = prefilling()
        words = ["prefill", "--prompt", "1", "--tokens"]
        with scripted_server(Prefill=script) as target:
            chosen = ["--durability", "local", "--pin", "hard", "--no-prefix-reuse"]
            assert cli.main([*words, *chosen, "--server", target]) == 0
            assert cli.main([*words, "--server", target]) == 0
        told, plain = script.requests
        assert told.retention.durability == session_service_pb2.DURABILITY_LOCAL
        assert told.retention.pin == session_service_pb2.PIN_HARD
        assert told.prefix_reuse == prefill_service_pb2.PREFIX_REUSE_OFF
        assert not told.retention.HasField("lease_duration")
        assert not plain.HasField("retention")
        assert plain.prefix_reuse == prefill_service_pb2.PREFIX_REUSE_UNSPECIFIED

    def test_prefill_says_where_cached_tokens_came_from(self, capsys: pytest.CaptureFixture[str]) -> None:
        result = prefill_service_pb2.PrefillResult(
            session={"session_id": "s-1", "num_tokens": 400},
            stats={"computed_tokens": 16, "cached_tokens": 384, "prefix_tokens": 256, "restored_tokens": 128},
        )
        script = Script([lambda _, __: iter(prefill_events(ACCEPTED, result))])
        with scripted_server(Prefill=script) as target:
            assert cli.main(["prefill", "--prompt", "1", "--tokens", "--server", target]) == 0
        shown = capsys.readouterr().out
        assert "400 (16 computed, 384 cached, of them 256 from other sessions and 128 from a slower tier)" in shown

    def test_prefill_prints_a_report_or_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        with scripted_server(Prefill=prefilling()) as target:
            assert cli.main(["prefill", "--prompt", "1", "--tokens", "--layers", "--server", target]) == 0
            assert "session     s-1\n" in capsys.readouterr().out
            assert cli.main(["prefill", "--prompt", "1", "--tokens", "--json", "--server", target]) == 0
        document = json.loads(capsys.readouterr().out)
        assert document["session"]["session_id"] == "s-1"
        assert document["stats"]["sparsity"] == 0.0

    def test_decode_streams_text(self, tokenizer_files: Any, capsys: pytest.CaptureFixture[str]) -> None:
        ids = [ord("h") - 33, ord("i") - 33]  # the byte alphabet begins with "!"
        with scripted_server(Decode=decoding(*ids), GetTokenizerFiles=tokenizer_files) as target:
            assert cli.main(["decode", "s-1", "--server", target]) == 0
            shown = capsys.readouterr()
            assert shown.out == "hi\n"
            assert "[3 tokens, -, ended by length]" in shown.err
            assert cli.main(["decode", "s-1", "--json", "--server", target]) == 0
        document = json.loads(capsys.readouterr().out)
        assert (document["text"], document["token_ids"], document["finish_reason"]) == ("hi", ids, "length")

    def test_decode_of_a_chat_appends_the_next_turn(self, tokenizer_files: Any) -> None:
        script = decoding(1)
        with scripted_server(Decode=script, GetTokenizerFiles=tokenizer_files) as target:
            words = ["decode", "s-1", "--prompt", "Why?", "--chat", "--server", target]
            assert cli.main(words) == 0
            assert cli.main([*words, "--close-answer"]) == 0
        ended, closed = (list(request.token_ids) for request in script.requests)
        assert closed[1:] == ended
        assert len(ended) == len("\n.user\nWhy?.\n.assistant\n")

    def test_decode_in_token_ids_needs_no_tokenizer(self, capsys: pytest.CaptureFixture[str]) -> None:
        script = decoding(7, 8)
        words = "decode s-1 --tokens --prompt 5 -n 9 --temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --seed 3"
        words += " --repetition-penalty 1.1 --stop-token 2 --stop-token 3 --ignore-eos --logprobs 1"
        with scripted_server(Decode=script) as target:
            assert cli.main([*words.split(), "--server", target]) == 0
        assert capsys.readouterr().out == "7 8 \n"
        request = script.requests[0]
        assert list(request.token_ids) == [5]
        assert list(request.stop_token_ids) == [2, 3]
        assert (request.max_new_tokens, request.ignore_eos, request.num_top_logprobs) == (9, True, 1)
        sampling = request.sampling
        assert (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p) == (0.5, 4, 0.9, 0.1)
        assert (sampling.seed, sampling.repetition_penalty) == (3, 1.1)

    def test_sessions_are_listed_as_a_table_or_json(self, capsys: pytest.CaptureFixture[str]) -> None:
        session = session_service_pb2.Session(session_id="s-1", num_tokens=5, size_bytes=3 << 20, labels={"k": "v"})
        session.remaining_lease_duration.FromSeconds(90)
        response = session_service_pb2.ListSessionsResponse(sessions=[session])
        with scripted_server(ListSessions=lambda _, __: response) as target:
            assert cli.main(["sessions", "list", "--server", target]) == 0
            rows = capsys.readouterr().out.splitlines()
            assert rows[1].split() == ["s-1", "unspecified", "5", "3.0", "MiB", "90", "s", "k=v"]
            assert cli.main(["sessions", "list", "--json", "--server", target]) == 0
        assert json.loads(capsys.readouterr().out)[0]["remaining_lease_seconds"] == 90

    def test_renew_exits_with_5_where_one_is_missing(self, capsys: pytest.CaptureFixture[str]) -> None:
        response = session_service_pb2.RenewSessionResponse(renewed=[{"session_id": "a"}], missing_session_ids=["b"])
        with scripted_server(RenewSession=lambda _, __: response) as target:
            assert cli.main(["sessions", "renew", "a", "b", "--lease", "10m", "--server", target]) == 5
        assert "no session b" in capsys.readouterr().err

    def test_fork_sends_its_options_and_shows_the_child(self, capsys: pytest.CaptureFixture[str]) -> None:
        child = session_service_pb2.Session(session_id="b", num_tokens=7, tier="KV_TIER_DEVICE")
        child.durability = session_service_pb2.DURABILITY_NONE
        child.retention.durability = session_service_pb2.DURABILITY_ASYNC
        script = Script([lambda _, __: session_service_pb2.ForkSessionResponse(session=child)])
        words = "sessions fork a --as b --tokens 7 --lease 10m --sliding --durability async --pin soft"
        with scripted_server(ForkSession=script) as target:
            assert cli.main([*words.split(), "--server", target]) == 0
        request = script.requests[0]
        assert (request.session_id, request.new_session_id, request.num_tokens) == ("a", "b", 7)
        assert (request.retention.lease_duration.seconds, request.retention.sliding) == (600, True)
        assert request.retention.durability == session_service_pb2.DURABILITY_ASYNC
        assert request.retention.pin == session_service_pb2.PIN_SOFT
        shown = capsys.readouterr().out
        assert "tier          device\n" in shown
        assert "durability    none of async\n" in shown

    def test_delete_says_what_was_freed(self, capsys: pytest.CaptureFixture[str]) -> None:
        response = session_service_pb2.DeleteSessionResponse(freed_bytes=2048)
        with scripted_server(DeleteSession=lambda _, __: response) as target:
            assert cli.main(["sessions", "delete", "a", "--server", target]) == 0
        assert capsys.readouterr().out == "a  2.0 KiB freed\n"

    def test_info_leaves_out_a_load_that_the_server_does_not_tell(self, capsys: pytest.CaptureFixture[str]) -> None:
        response = server_service_pb2.GetServerInfoResponse(model_name="tiny", max_sequence_tokens=4096)
        with scripted_server(GetServerInfo=lambda _, __: response) as target:
            assert cli.main(["info", "--server", target]) == 0
            assert "4096 tokens" in capsys.readouterr().out
            assert cli.main(["info", "--json", "--server", target]) == 0
        assert json.loads(capsys.readouterr().out)["load"] is None

    def test_target_and_token_come_from_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        script = Script([lambda _, __: session_service_pb2.ListSessionsResponse()])
        with scripted_server(ListSessions=script) as target:
            monkeypatch.setenv("SALE_PREFILL_TARGET", target)
            monkeypatch.setenv("SALE_PREFILL_TOKEN", "secret")
            assert cli.main(["sessions", "list"]) == 0
        assert script.metadata[0]["authorization"] == "Bearer secret"


class TestExitCodes:
    @pytest.mark.parametrize(
        ("code", "reason", "status"),
        [
            (grpc.StatusCode.INTERNAL, "ENGINE_FAILED", 1),
            (grpc.StatusCode.ABORTED, "SESSION_BUSY", 1),
            (grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED", 1),
            (grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL", 3),
            (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", 4),
            (grpc.StatusCode.OUT_OF_RANGE, "CONTEXT_EXCEEDED", 4),
            (grpc.StatusCode.NOT_FOUND, "SESSION_UNKNOWN", 5),
            (grpc.StatusCode.NOT_FOUND, "SESSION_EXPIRED", 5),
        ],
    )
    def test_they_tell_kinds_of_failure_apart(
        self, code: grpc.StatusCode, reason: str, status: int, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with scripted_server(GetSession=failing(code, reason)) as target:
            assert cli.main(["sessions", "get", "s-1", "--server", target]) == status
        shown = capsys.readouterr()
        assert shown.out == ""
        assert shown.err == f"sale-prefill: because of {reason} [{code.name} {reason}]\n"

    def test_3_where_no_server_is(self) -> None:
        assert cli.main(["info", "--wait", "300ms", "--server", "127.0.0.1:1"]) == 3

    def test_2_for_words_that_argparse_refuses(self) -> None:
        for words in ([], ["nonsense"], ["info", "--timeout", "soon"], ["pull", "s", "--output", "f", "--layers", "4"]):
            with pytest.raises(SystemExit) as end:
                cli.main(words)
            assert end.value.code == 2


def start(*words: str, **options: Any) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "sale_prefill_client.cli", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


class TestProcess:
    def endless(self, gone: threading.Event) -> Any:
        def handler(_: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            context.add_callback(gone.set)
            yield DECODE_ACCEPTED
            while context.is_active():
                yield decode_tokens(7)
                time.sleep(0.001)

        return handler

    def test_ctrl_c_cancels_the_request_and_exits_with_130(self) -> None:
        gone = threading.Event()
        with scripted_server(Decode=self.endless(gone)) as target:
            # A shell's background job ignores Ctrl-C and hands that down; somebody's terminal does not.
            heeds = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
            process = start("decode", "s-1", "--tokens", "--server", target, preexec_fn=heeds)
            assert process.stdout is not None
            assert process.stdout.read(2) == "7 "
            process.send_signal(signal.SIGINT)
            _, shown = process.communicate(timeout=20)
            assert gone.wait(5)
        assert process.returncode == 130
        assert shown == "sale-prefill: interrupted\n"

    def test_a_closed_output_ends_quietly_and_cancels_the_request(self) -> None:
        gone = threading.Event()
        with scripted_server(Decode=self.endless(gone)) as target:
            process = start("decode", "s-1", "--tokens", "--server", target)
            assert process.stdout is not None
            assert process.stderr is not None
            os.read(process.stdout.fileno(), 2)
            process.stdout.close()
            assert process.wait(timeout=20) == 141
            assert process.stderr.read() == ""
            process.stderr.close()
            assert gone.wait(5)

    def test_no_progress_bar_where_standard_error_is_no_terminal(self) -> None:
        with scripted_server(Prefill=prefilling()) as target:
            words = ("prefill", "--prompt", "1", "--tokens", "--server", target)
            _, quiet = start(*words).communicate(timeout=20)
            _, shown = start(*words, "--progress", "always").communicate(timeout=20)
        assert quiet == ""
        assert "8/8" in shown
