"""Segments when one of the two processes dies."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sale_prefill_client.segments import SharedSegment
from sale_prefill_server.errors import PrefillError
from sale_prefill_server.transfer.segments import SegmentTicket
from tests.segments import SHM, answer, broker_in, connected, open_descriptors, peer_process, wait_until

SIZE_BYTES = 16 * 2**20

#: A server's part: opens segments and says how to get them, until it is killed.
SERVER = """
import sys
from pathlib import Path
from tests.segments import SHM, broker_in
with broker_in(Path(sys.argv[1])) as broker:
    for _ in range(3):
        ticket = broker.open("a", SHM, int(sys.argv[2]))
        print(ticket.transfer_id, ticket.socket_path, ticket.token.hex(), flush=True)
    print("open", flush=True)
    sys.stdin.readline()
    with broker.borrow("a", sys.stdin.readline().strip()) as segment, segment.memory() as memory:
        memory.fill_(9)
        print("written", flush=True)
        sys.stdin.readline()
"""


def memfds() -> int:
    """Anonymous shared memory of this process: descriptors and mappings."""
    links = [str(file.readlink()) for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    maps = Path("/proc/self/maps").read_text().splitlines()
    return sum("sale-prefill-kv" in line for line in (*links, *maps))


def test_a_reader_that_is_killed_in_the_middle_of_a_stream_leaves_nothing(tmp_path: Path) -> None:
    with broker_in(tmp_path) as broker:
        descriptors = open_descriptors()
        for _ in range(3):
            ticket = broker.open("a", SHM, SIZE_BYTES)
            with peer_process(ticket) as reader, broker.borrow("a", ticket.transfer_id) as segment:
                with segment.memory() as memory:
                    memory[: SIZE_BYTES // 2] = 5
                    assert answer(reader, "array[1000]") == "5"
                reader.send_signal(signal.SIGKILL)
                reader.wait()
                with segment.memory() as memory:  # the stream has not noticed yet
                    memory[SIZE_BYTES // 2 :] = 6
                    del memory
                assert broker.budget.used_bytes() == SIZE_BYTES
            wait_until(lambda: broker.budget.used_bytes() == 0)
            with pytest.raises(PrefillError), broker.borrow("a", ticket.transfer_id):
                pass
        wait_until(lambda: open_descriptors() == descriptors)
        assert memfds() == 0


def test_a_reader_that_is_killed_between_streams_leaves_nothing(tmp_path: Path) -> None:
    with broker_in(tmp_path) as broker:
        ticket = broker.open("a", SHM, SIZE_BYTES)
        with peer_process(ticket) as reader:
            reader.send_signal(signal.SIGKILL)
            wait_until(lambda: broker.budget.used_bytes() == 0)
        assert memfds() == 0


def test_a_server_that_is_killed_leaves_its_reader_the_memory_and_its_successor_no_litter(tmp_path: Path) -> None:
    shared_memory = set(Path("/dev/shm").iterdir())
    run = tmp_path / "run"
    command = [sys.executable, "-c", SERVER, str(run), str(SIZE_BYTES)]
    server = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    assert server.stdin is not None
    try:
        segments: list[SharedSegment] = []
        while (line := server.stdout.readline().strip()) != "open":
            transfer_id, path, token = line.split()
            ticket = SegmentTicket(transfer_id, SHM, SIZE_BYTES, path, bytes.fromhex(token), None, 30.0)
            segments.append(connected(ticket))
        array = segments[1].array((SIZE_BYTES,))
        server.stdin.write(f"\n{segments[1].transfer_id}\n")
        server.stdin.flush()
        assert server.stdout.readline() == "written\n"
    finally:
        server.kill()
        server.wait()
    assert not any(segment.connected for segment in segments)
    assert (array == 9).all()
    array[:] = 4
    kept = torch.from_numpy(array[:100])
    for segment in segments:
        segment.close()
    del array
    assert kept.tolist() == [4] * 100
    del kept
    assert memfds() == 0

    left = [entry.name for entry in run.iterdir() if entry.is_dir()]
    assert len(left) == 1
    with broker_in(run) as broker:
        connected(broker.open("a", SHM, SIZE_BYTES)).close()
        assert left[0] not in [entry.name for entry in run.iterdir()]
    assert [entry.name for entry in run.iterdir()] == ["lock"]
    assert set(Path("/dev/shm").iterdir()) == shared_memory


def test_a_server_leaves_the_folders_of_others_that_live(tmp_path: Path) -> None:
    with broker_in(tmp_path) as first:
        with broker_in(tmp_path) as second:
            assert len([entry for entry in tmp_path.iterdir() if entry.is_dir()]) == 2
            connected(second.open("a", SHM, 1)).close()
        connected(first.open("a", SHM, 1)).close()
