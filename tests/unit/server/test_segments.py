"""Segments: who gets one, for how long, and that all of it comes back."""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from sale_prefill_client.segments import SegmentUnreachableError, SharedSegment
from sale_prefill_server.errors import PrefillError, Reason
from sale_prefill_server.transfer import segment_listener
from sale_prefill_server.transfer.segment_budget import SegmentLimits
from sale_prefill_server.transfer.segment_memory import SharedMemory
from sale_prefill_server.transfer.segments import SegmentBroker, SegmentTicket, open_broker
from sale_prefill_server.transfer.socket_directory import SocketDirectory, SocketDirectoryError
from tests.segments import SHM, broker_in, connected, descriptor_of, open_descriptors, wait_until

MIB = 2**20


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[SegmentBroker]:
    with broker_in(tmp_path / "run") as broker:
        yield broker


def refused(broker: SegmentBroker, ticket: SegmentTicket, tenant: str = "a") -> Reason:
    """Why a stream cannot have the segment."""
    with pytest.raises(PrefillError) as caught, broker.borrow(tenant, ticket.transfer_id):
        pass
    return caught.value.reason


def test_what_the_server_writes_is_what_the_owner_sees_and_the_other_way_round(broker: SegmentBroker) -> None:
    ticket = broker.open("a", SHM, 1000)
    assert ticket.size_bytes == mmap.PAGESIZE
    segment = connected(ticket)
    array = segment.array((1000,))
    with broker.borrow("a", ticket.transfer_id) as mine, mine.memory() as memory:
        memory[:1000] = torch.arange(1000).to(torch.uint8)
        assert array[999] == 999 % 256
        array[5] = 77
        assert int(memory[5]) == 77
    segment.close()


def test_memory_cannot_be_cut_or_grown_by_either_side() -> None:
    memory = SharedMemory(MIB)
    for size_bytes in (0, 2 * MIB):
        with pytest.raises(PermissionError):
            os.ftruncate(memory.file_descriptor, size_bytes)
    with pytest.raises(PermissionError):
        fcntl.fcntl(memory.file_descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    memory.free()


def test_a_view_that_outlives_its_segment_stays_readable() -> None:
    memory = SharedMemory(MIB)
    view = memory.bytes()[:10].fill_(7)
    memory.free()
    assert view.tolist() == [7] * 10


def test_a_token_is_good_once(broker: SegmentBroker) -> None:
    ticket = broker.open("a", SHM, MIB)
    first = connected(ticket)
    with pytest.raises(SegmentUnreachableError):
        connected(ticket)
    assert first.connected
    first.close()


@pytest.mark.parametrize("token", [b"\0" * segment_listener.TOKEN_BYTES, b"x" * 4000])
def test_a_wrong_token_gets_nothing(broker: SegmentBroker, token: bytes) -> None:
    ticket = broker.open("a", SHM, MIB)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(ticket.socket_path)
        stranger.sendall(token)
        assert stranger.recv(1) == b""
    connected(ticket).close()


def test_a_peer_that_says_nothing_holds_nobody_up_and_is_let_go(
    broker: SegmentBroker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(segment_listener, "_HANDSHAKE_SECONDS", 0.5)
    ticket = broker.open("a", SHM, MIB)
    with socket.socket(socket.AF_UNIX) as silent:
        silent.settimeout(10)
        silent.connect(ticket.socket_path)
        connected(ticket).close()
        assert silent.recv(1) == b""


def test_another_users_process_gets_nothing(broker: SegmentBroker, monkeypatch: pytest.MonkeyPatch) -> None:
    ticket = broker.open("a", SHM, MIB)
    monkeypatch.setattr(broker._listener, "_uids", frozenset({os.getuid() + 1}))
    with pytest.raises(SegmentUnreachableError):
        connected(ticket)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_the_kernel_keeps_other_users_from_the_socket_and_says_who_they_are(tmp_path: Path) -> None:
    for allowed, opened in ((frozenset(), False), (frozenset({4242}), False), (frozenset({4243}), True)):
        with broker_in(Path(f"/tmp/sale-prefill-test-{os.getpid()}"), allowed_uids=allowed) as broker:
            ticket = broker.open("a", SHM, MIB)
            child = os.fork()
            if not child:
                os.setuid(4243)
                try:
                    connected(ticket)
                    os._exit(0)
                except SegmentUnreachableError:
                    os._exit(1)
            _, status = os.waitpid(child, 0)
            assert (os.waitstatus_to_exitcode(status) == 0) is opened
    Path(f"/tmp/sale-prefill-test-{os.getpid()}/lock").unlink()
    Path(f"/tmp/sale-prefill-test-{os.getpid()}").rmdir()


def test_another_tenant_cannot_name_a_segment(broker: SegmentBroker) -> None:
    ticket = broker.open("a", SHM, MIB)
    segment = connected(ticket)
    assert refused(broker, ticket, tenant="b") is Reason.TRANSFER_UNKNOWN
    with pytest.raises(PrefillError) as caught:
        broker.close("b", ticket.transfer_id)
    assert caught.value.reason is Reason.TRANSFER_UNKNOWN
    segment.close()


def test_one_stream_at_a_time_and_any_number_in_turn(broker: SegmentBroker) -> None:
    ticket = broker.open("a", SHM, MIB)
    segment = connected(ticket)
    for _ in range(3):
        with broker.borrow("a", ticket.transfer_id):
            assert refused(broker, ticket) is Reason.SESSION_BUSY
    segment.close()


def test_a_segment_that_nobody_connected_to_serves_no_stream(broker: SegmentBroker) -> None:
    assert refused(broker, broker.open("a", SHM, MIB)) is Reason.INVALID_FIELD


def test_a_segment_goes_with_its_owners_connection(broker: SegmentBroker) -> None:
    ticket = broker.open("a", SHM, MIB)
    segment = connected(ticket)
    array = segment.array((4,))
    assert broker.budget.used_bytes() == MIB
    segment.close()
    wait_until(lambda: broker.budget.used_bytes() == 0)
    assert refused(broker, ticket) is Reason.TRANSFER_UNKNOWN
    array[:] = 3  # the owner's mapping stays
    assert array.tolist() == [3] * 4


def test_a_stream_has_its_segment_to_its_end(broker: SegmentBroker) -> None:
    ticket = broker.open("a", SHM, MIB)
    segment = connected(ticket)
    with broker.borrow("a", ticket.transfer_id) as mine:
        segment.close()
        wait_until(lambda: refused(broker, ticket) is Reason.TRANSFER_UNKNOWN)
        with mine.memory() as memory:
            memory.fill_(1)
        assert broker.budget.used_bytes() == MIB
    wait_until(lambda: broker.budget.used_bytes() == 0)


def test_a_copy_that_a_cancelled_stream_left_running_still_has_its_memory(broker: SegmentBroker) -> None:
    ticket = broker.open("a", SHM, MIB)
    segment = connected(ticket)
    inside, go_on = threading.Event(), threading.Event()

    def copy() -> None:
        with mine.memory() as memory:
            inside.set()
            go_on.wait(10)
            memory.fill_(1)

    with broker.borrow("a", ticket.transfer_id) as mine:
        thread = threading.Thread(target=copy)
        thread.start()
        inside.wait(10)
        broker.close("a", ticket.transfer_id)
    assert broker.budget.used_bytes() == MIB
    go_on.set()
    thread.join()
    wait_until(lambda: broker.budget.used_bytes() == 0)
    with pytest.raises(PrefillError, match="has ended"), mine.memory():
        pass
    segment.close()


def test_closing_ends_the_owners_connection(broker: SegmentBroker) -> None:
    ticket = broker.open("a", SHM, MIB)
    segment = connected(ticket)
    broker.close("a", ticket.transfer_id)
    wait_until(lambda: not segment.connected)
    assert broker.budget.used_bytes() == 0
    with pytest.raises(PrefillError):
        broker.close("a", ticket.transfer_id)


def test_what_nobody_uses_is_swept(tmp_path: Path) -> None:
    with broker_in(tmp_path, connect_seconds=0.0, idle_seconds=0.2) as broker:
        broker.open("a", SHM, MIB)
        wait_until(lambda: broker.budget.used_bytes() == 0)
    with broker_in(tmp_path, idle_seconds=0.0) as broker:
        ticket = broker.open("a", SHM, MIB)
        segment = connected(ticket)
        wait_until(lambda: not segment.connected and broker.budget.used_bytes() == 0)
    with broker_in(tmp_path, idle_seconds=0.3) as broker:
        ticket = broker.open("a", SHM, MIB)
        segment = connected(ticket)
        with broker.borrow("a", ticket.transfer_id):
            time.sleep(0.4)
            broker.sweep()
            assert broker.budget.used_bytes() == MIB


def test_bytes_and_segments_are_limited(tmp_path: Path) -> None:
    with broker_in(tmp_path, segments_per_tenant=2) as broker:
        held = [connected(broker.open("a", SHM, 20 * MIB)) for _ in range(2)]
        with pytest.raises(PrefillError, match="the most that a tenant may have") as caught:
            broker.open("a", SHM, 1)
        assert caught.value.reason is Reason.KV_CAPACITY
        with pytest.raises(PrefillError, match="are free") as caught:
            broker.open("b", SHM, 30 * MIB)
        assert caught.value.metadata == {"needed_bytes": str(30 * MIB), "free_bytes": str(24 * MIB)}
        for segment in held:
            segment.close()
        wait_until(lambda: broker.budget.used_bytes() == 0)
        broker.open("a", SHM, 60 * MIB)


def test_memory_that_cannot_be_had_is_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with broker_in(tmp_path) as broker:
        monkeypatch.setattr(os, "ftruncate", lambda *_: (_ for _ in ()).throw(OSError(12, "no memory")))
        before = open_descriptors()
        with pytest.raises(PrefillError, match="no memory") as caught:
            broker.open("a", SHM, MIB)
        assert caught.value.reason is Reason.KV_CAPACITY
        assert broker.budget.used_bytes() == 0
        assert open_descriptors() == before


class _GoesWithItsOwner(SharedMemory):
    """Memory that a peer must have unmapped before it may be freed, as device memory must be."""

    outlives_owner = False


def test_memory_that_does_not_outlive_its_owner_waits_for_the_peer(tmp_path: Path) -> None:
    limits = SegmentLimits({SHM: MIB})
    broker = open_broker(tmp_path, limits, {SHM: _GoesWithItsOwner}, frozenset())
    ticket = broker.open("a", SHM, MIB)
    segment = connected(ticket)
    broker.close("a", ticket.transfer_id)
    broker.sweep()
    assert segment.connected
    assert broker.budget.used_bytes() == MIB
    assert refused(broker, ticket) is Reason.TRANSFER_UNKNOWN
    segment.close()
    wait_until(lambda: broker.budget.used_bytes() == 0)
    never_connected = broker.open("a", SHM, MIB)
    broker.close("a", never_connected.transfer_id)
    assert broker.budget.used_bytes() == 0
    kept = connected(broker.open("a", SHM, MIB))
    broker.close_all()
    assert broker.budget.used_bytes() == 0
    kept.close()


def test_hundreds_of_segments_leave_nothing(broker: SegmentBroker) -> None:
    def cycle(number: int) -> None:
        ticket = broker.open("a", SHM, MIB)
        segment = connected(ticket)
        with broker.borrow("a", ticket.transfer_id) as mine, mine.memory() as memory:
            memory[number] = number % 256
        if number % 2:
            broker.close("a", ticket.transfer_id)
        segment.close()

    cycle(0)
    wait_until(lambda: broker.budget.used_bytes() == 0)
    before = open_descriptors()
    for number in range(300):
        cycle(number)
    wait_until(lambda: broker.budget.used_bytes() == 0)
    wait_until(lambda: open_descriptors() == before)
    assert not broker.budget.open_segments()


def test_many_threads_that_open_use_and_drop_segments_lose_none(tmp_path: Path) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        choose = random.Random(seed)
        try:
            for _ in range(40):
                ticket = broker.open(f"tenant-{seed}", SHM, choose.randrange(1, MIB))
                segment = connected(ticket)
                with broker.borrow(f"tenant-{seed}", ticket.transfer_id) as mine:
                    if choose.random() < 0.5:
                        segment.close()
                    with mine.memory() as memory:
                        memory.fill_(seed)
                    if choose.random() < 0.5:
                        with suppress(PrefillError):  # its owner may have closed it
                            broker.close(f"tenant-{seed}", ticket.transfer_id)
                segment.close()
        except BaseException as error:
            failures.append(error)

    with broker_in(tmp_path) as broker:
        before = open_descriptors()
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert failures == []
        wait_until(lambda: broker.budget.used_bytes() == 0 and not broker.budget.open_segments())
        wait_until(lambda: open_descriptors() <= before)


def test_closing_a_broker_frees_everything_and_its_folder(tmp_path: Path) -> None:
    before = open_descriptors()
    with broker_in(tmp_path / "run") as broker:
        segment = connected(broker.open("a", SHM, MIB))
        broker.open("a", SHM, MIB)
    assert broker.budget.used_bytes() == 0
    assert not segment.connected
    segment.close()
    assert open_descriptors() == before
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["lock"]
    with pytest.raises(PrefillError) as caught:
        broker.open("a", SHM, 1)
    assert caught.value.reason is Reason.SHUTTING_DOWN


def test_only_this_user_can_look_into_the_folder(broker: SegmentBroker) -> None:
    socket_file = Path(broker.open("a", SHM, 1).socket_path)
    modes = [entry.stat().st_mode & 0o777 for entry in (socket_file, socket_file.parent, socket_file.parent.parent)]
    assert modes == [0o600, 0o700, 0o700]


def test_a_folder_that_cannot_be_used_is_named_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to(tmp_path)
    for name in ("file", "link"):
        with pytest.raises(SocketDirectoryError, match=rf"{name}.*name another"):
            SocketDirectory(tmp_path / name)
    with pytest.raises(SocketDirectoryError, match="nearer to the root"), broker_in(tmp_path / ("deep" * 30)):
        pass


def test_arrays_tell_whether_a_segment_may_be_written_anew(broker: SegmentBroker) -> None:
    segment = connected(broker.open("a", SHM, MIB))
    assert segment.idle
    array = segment.array((2, 8))
    row = torch.from_numpy(array[1])
    del array
    assert not segment.idle
    del row
    assert segment.idle
    with pytest.raises(ValueError, match="larger"):
        segment.array((MIB + 1,))
    segment.close()
    with pytest.raises(ValueError, match="closed"):
        segment.array((1,))


def test_a_socket_that_is_not_there_is_unreachable() -> None:
    ticket = SegmentTicket("t", SHM, MIB, "/nowhere/kv.sock", b"t" * 32, None, 1.0)
    before = open_descriptors()
    with pytest.raises(SegmentUnreachableError, match="cannot be used from here"):
        SharedSegment("t", descriptor_of(ticket), MIB)
    assert open_descriptors() == before
