"""CUDA IPC where there is no GPU: what fails says why, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from sale_prefill.v1 import kv_transfer_service_pb2 as pb
from sale_prefill_client.cuda_segments import CudaSegment, DeviceKvCache
from sale_prefill_client.kv import KvCache
from sale_prefill_client.results import KvSpec
from sale_prefill_client.segments import SegmentUnreachableError
from sale_prefill_server.errors import PrefillError, Reason
from sale_prefill_server.kv.pool import KvShape
from sale_prefill_server.rpc.transfer_calls import descriptor_message
from sale_prefill_server.transfer.checksums import Checksum
from sale_prefill_server.transfer.chunks import KvRange, Layout
from sale_prefill_server.transfer.cuda_memory import CudaError, CudaIpcMemory, register_host_memory
from sale_prefill_server.transfer.segment_budget import SegmentLimits
from sale_prefill_server.transfer.segment_memory import SegmentTransport, SharedMemory
from sale_prefill_server.transfer.segment_placement import SegmentPlacement
from sale_prefill_server.transfer.segments import SegmentTicket, open_broker
from tests.segments import SHM, broker_in, connected, open_descriptors

CUDA_IPC = SegmentTransport.CUDA_IPC
DEVICE = torch.device("cuda:0")
without_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@without_gpu
def test_a_call_that_fails_names_itself() -> None:
    with pytest.raises(CudaError, match=r"cudaSetDevice: .* \(cudaError \d+\)|libcudart"):
        CudaIpcMemory(1000, DEVICE)


@without_gpu
def test_memory_that_cannot_be_registered_is_given_back() -> None:
    before = open_descriptors()
    with pytest.raises(CudaError):
        SharedMemory(2**20, lambda address, size_bytes: register_host_memory(address, size_bytes, DEVICE))
    assert open_descriptors() == before


@without_gpu
def test_a_segment_that_the_device_has_no_memory_for_is_refused_and_not_counted(tmp_path: Path) -> None:
    allocators = {CUDA_IPC: lambda size_bytes: CudaIpcMemory(size_bytes, DEVICE)}
    broker = open_broker(tmp_path, SegmentLimits({CUDA_IPC: 2**20}), allocators, frozenset())
    with pytest.raises(PrefillError, match="cannot be had") as caught:
        broker.open("a", CUDA_IPC, 1000)
    assert caught.value.reason is Reason.KV_CAPACITY
    assert broker.budget.used_bytes() == 0
    broker.close_all()


@without_gpu
def test_a_reader_that_does_not_see_the_gpu_says_so() -> None:
    ticket = SegmentTicket("t", CUDA_IPC, 4096, "/nowhere/kv.sock", b"t" * 32, (b"h" * 64, b"u" * 16), 1.0)
    message = descriptor_message(ticket)
    assert isinstance(message, pb.CudaIpcDescriptor)
    assert message.connection.token == ticket.token
    with pytest.raises(SegmentUnreachableError, match="does not see the server's GPU 75757575-"):
        CudaSegment("t", message.SerializeToString(), 4096)


def test_device_memory_goes_without_a_digest_and_only_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = KvShape(1, 1, 8, torch.float32, torch.device("cpu"))
    with broker_in(tmp_path) as broker:
        ticket = broker.open("a", SHM, 2**16)
        owner = connected(ticket)
        with broker.borrow("a", ticket.transfer_id) as segment:
            monkeypatch.setattr(segment, "transport", CUDA_IPC)
            for checksum in (Checksum.CRC32C, Checksum.XXH3_64):
                with pytest.raises(PrefillError, match="ask for NONE") as caught:
                    SegmentPlacement(segment, shape, KvRange(0, 4, 0, 1), Layout.THD, checksum)
                assert caught.value.field == "checksum_algorithm"
            SegmentPlacement(segment, shape, KvRange(0, 4, 0, 1), Layout.THD, Checksum.NONE)
        owner.close()


def test_a_cache_in_device_memory_reads_like_any_other() -> None:
    spec = KvSpec(
        model_fingerprint="m",
        element_type="bfloat16",
        layout="THD",
        num_layers=2,
        num_kv_heads=2,
        head_dim=4,
        rope_applied=True,
        rope_fingerprint="r",
    )
    buffer = torch.randint(0, 256, (2, 2, 3, 2, 8), dtype=torch.uint8)  # on the CPU here, on a device else
    fields = {"session_id": "s", "spec": spec, "token_start": 0, "token_end": 3, "layer_start": 0, "layer_end": 2}
    device = DeviceKvCache(**fields, generation=1, token_digest=b"", buffer=buffer)
    host = KvCache(**fields, generation=1, token_digest=b"", buffer=buffer.numpy())
    assert device.num_bytes == host.num_bytes
    assert (device.numpy() == host.numpy()).all()
    assert torch.equal(device.torch().view(torch.int16), host.torch().view(torch.int16))
    assert device.torch().data_ptr() == buffer.data_ptr()
    assert device.layer(1)[0].shape == (3, 2, 4)
