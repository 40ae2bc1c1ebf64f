"""`sale-prefill sessions`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from ..results import Session
from . import _exit
from ._arguments import Command, add_connection_arguments, add_survival_arguments, connect, duration, new_parser
from ._output import note, seconds, size, write, write_facts, write_json, write_table

COMMAND = Command(
    "sessions",
    "list, show, renew, fork or delete retained KV caches",
    "sale-prefill sessions renew SESSION --lease 10m",
)
_COMMANDS = (
    Command("list", "list the sessions, oldest first", "sale-prefill sessions list --json"),
    Command("get", "show one session", "sale-prefill sessions get SESSION"),
    Command("renew", "extend leases; never shortens one", "sale-prefill sessions renew SESSION --lease 10m"),
    Command("fork", "make a session that shares another one's first tokens", "sale-prefill sessions fork SESSION"),
    Command("delete", "free the KV now", "sale-prefill sessions delete SESSION --allow-missing"),
)


def add(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its own commands."""
    parser = new_parser(commands, COMMAND)
    actions = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    runners: dict[str, Callable[[argparse.Namespace], int]] = {
        "list": run_list,
        "get": run_get,
        "renew": run_renew,
        "fork": run_fork,
        "delete": run_delete,
    }
    for command in _COMMANDS:
        child = new_parser(actions, command)
        child.set_defaults(run=runners[command.name])
        if command.name in ("get", "fork"):
            child.add_argument("session", metavar="SESSION", help="id of the session")
        elif command.name != "list":
            child.add_argument("sessions", metavar="SESSION", nargs="+", help="ids of the sessions")
        if command.name == "renew":
            child.add_argument(
                "--lease", metavar="DURATION", type=duration, help="from now; each one's own if left out"
            )
        elif command.name == "fork":
            _add_fork_arguments(child)
        elif command.name == "delete":
            child.add_argument("--allow-missing", action="store_true", help="succeed where a session is not there")
            child.add_argument("--force", action="store_true", help="stop a running request too")
        add_connection_arguments(child)


def _add_fork_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--as", dest="new_session", metavar="ID", help="id of the child; the server's choice if left out"
    )
    parser.add_argument("--tokens", metavar="N", type=int, default=0, help="tokens to share; all if left out")
    group = parser.add_argument_group("the child's policy; its parent's where none of these is given")
    group.add_argument("--lease", metavar="DURATION", type=duration, help="how long to keep the child, such as 10m")
    group.add_argument("--sliding", action="store_true", help="requests extend the child's lease")
    add_survival_arguments(group)


def _write_sessions(sessions: Sequence[Session]) -> None:
    rows = [
        (
            session.session_id,
            session.state,
            str(session.num_tokens),
            size(session.size_bytes),
            seconds(session.remaining_lease_seconds),
            " ".join(f"{key}={value}" for key, value in sorted(session.labels.items())),
        )
        for session in sessions
    ]
    write_table(("SESSION", "STATE", "TOKENS", "KV", "LEASE LEFT", "LABELS"), rows)


def run_list(arguments: argparse.Namespace) -> int:
    """`sessions list`."""
    with connect(arguments) as client:
        sessions = list(client.list_sessions())
    if arguments.json:
        write_json(sessions)
    else:
        _write_sessions(sessions)
    return _exit.OK


def run_get(arguments: argparse.Namespace) -> int:
    """`sessions get`."""
    with connect(arguments) as client:
        session = client.get_session(arguments.session)
    return _show(session, as_json=arguments.json)


def run_fork(arguments: argparse.Namespace) -> int:
    """`sessions fork`."""
    with connect(arguments) as client:
        session = client.fork_session(
            arguments.session,
            new_session_id=arguments.new_session,
            num_tokens=arguments.tokens,
            lease_seconds=arguments.lease,
            sliding=arguments.sliding,
            durability=arguments.durability,
            pin=arguments.pin,
        )
    return _show(session, as_json=arguments.json)


def _show(session: Session, *, as_json: bool) -> int:
    if as_json:
        write_json(session)
        return _exit.OK
    created = "-" if session.create_time is None else session.create_time.isoformat(timespec="seconds")
    facts = [
        ("session", session.session_id),
        ("server", session.server_id),
        ("state", session.state),
        ("tokens", str(session.num_tokens)),
        ("KV", size(session.size_bytes)),
        ("created", created),
        ("lease", f"{seconds(session.lease_seconds)}{' sliding' if session.sliding else ''}"),
        ("lease left", seconds(session.remaining_lease_seconds)),
        ("tier", session.tier or "-"),
        ("durability", f"{session.durability or '-'} of {session.wanted_durability or '-'}"),
        ("pin", session.pin or "-"),
        ("generation", str(session.generation)),
        ("attention", session.attention.mode),
        ("token digest", session.token_digest.hex()),
    ]
    write_facts(facts + [(f"label {key}", value) for key, value in sorted(session.labels.items())])
    return _exit.OK


def run_renew(arguments: argparse.Namespace) -> int:
    """`sessions renew`."""
    with connect(arguments) as client:
        result = client.renew_sessions(arguments.sessions, lease_seconds=arguments.lease)
    if arguments.json:
        write_json(result)
    else:
        _write_sessions(result.renewed)
    for session_id in result.missing_session_ids:
        note(f"sale-prefill: no session {session_id} on this server")
    return _exit.NOT_FOUND if result.missing_session_ids else _exit.OK


def run_delete(arguments: argparse.Namespace) -> int:
    """`sessions delete`."""
    freed: dict[str, int] = {}
    with connect(arguments) as client:
        for session_id in arguments.sessions:
            freed[session_id] = client.delete_session(
                session_id, allow_missing=arguments.allow_missing, force=arguments.force
            )
            if not arguments.json:
                write(f"{session_id}  {size(freed[session_id])} freed\n")
    if arguments.json:
        write_json([{"session_id": key, "freed_bytes": value} for key, value in freed.items()])
    return _exit.OK
