"""The segments that a server of some device and some settings offers."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import psutil
import torch

from sale_prefill_server.config import ConfigError, ServerConfig, parse_bytes
from sale_prefill_server.transfer.cuda_memory import CudaIpcMemory, register_host_memory
from sale_prefill_server.transfer.segment_budget import SegmentLimits
from sale_prefill_server.transfer.segment_memory import SegmentTransport, SharedMemory
from sale_prefill_server.transfer.segments import Allocator, SegmentBroker, open_broker
from sale_prefill_server.transfer.socket_directory import SocketDirectoryError, default_base
from sale_prefill_server.transfer.streaming_copy import can_gather


def configured_broker(config: ServerConfig, device: torch.device) -> SegmentBroker:
    """A broker for a model on `device`; of no transports where settings or the system have none.

    Raises:
        ConfigError: a setting cannot be used.
    """
    capacity_bytes: dict[SegmentTransport, int] = {}
    allocators: dict[SegmentTransport, Allocator] = {}
    host_bytes = _bytes(config.transfer_memory, "transfer_memory", int(psutil.virtual_memory().available) // 4)
    if host_bytes and hasattr(os, "memfd_create"):
        can_gather()  # builds native copies, where this machine has not done that yet
        capacity_bytes[SegmentTransport.SHM] = host_bytes
        pin = _pin(device) if device.type == "cuda" else None
        allocators[SegmentTransport.SHM] = lambda size_bytes: SharedMemory(size_bytes, pin)
    if device.type == "cuda":
        eighth = torch.cuda.get_device_properties(device).total_memory // 8
        device_bytes = _bytes(config.transfer_device_memory, "transfer_device_memory", eighth)
        if device_bytes:
            capacity_bytes[SegmentTransport.CUDA_IPC] = device_bytes
            allocators[SegmentTransport.CUDA_IPC] = lambda size_bytes: CudaIpcMemory(size_bytes, device)
    base = Path(config.transfer_directory) if config.transfer_directory else default_base()
    try:
        return open_broker(base, SegmentLimits(capacity_bytes), allocators, config.transfer_uid_numbers)
    except SocketDirectoryError as error:
        raise ConfigError(
            f"{error}, or share no memory: transfer_memory = '0', transfer_device_memory = '0'"
        ) from error


def _bytes(setting: str, name: str, automatic: int) -> int:
    return automatic if setting == "auto" else parse_bytes(name, setting)


def _pin(device: torch.device) -> Callable[[int, int], Callable[[], None]]:
    return lambda address, size_bytes: register_host_memory(address, size_bytes, device)
