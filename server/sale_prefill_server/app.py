"""Start-up and shutdown of one server process: builds the parts and connects them, nothing else."""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import grpc
import psutil
import torch
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from prometheus_client import start_http_server

from sale_attention import (
    ModelFingerprint,
    Profile,
    ProfileError,
    SaleConfig,
    get_backend,
    load_profile,
    shipped_profile,
)
from sale_prefill.v1 import (
    kv_transfer_service_pb2,
    kv_transfer_service_pb2_grpc,
    prefill_service_pb2,
    prefill_service_pb2_grpc,
    server_service_pb2,
    server_service_pb2_grpc,
    session_service_pb2,
    session_service_pb2_grpc,
)
from sale_prefill_client._version import __version__
from sale_prefill_server.config import ConfigError, ServerConfig, parse_bytes
from sale_prefill_server.engine.engine import Engine
from sale_prefill_server.engine.guard import Guard, GuardReport, GuardSettings
from sale_prefill_server.engine.model import LoadedModel, choose_device, load_model
from sale_prefill_server.engine.sequence import AttentionMode, AttentionSettings
from sale_prefill_server.errors import PrefillError, Reason
from sale_prefill_server.events import EventBus, GuardLooked
from sale_prefill_server.kv.pool import KvCapacityError, KvPool
from sale_prefill_server.models import resolve_model
from sale_prefill_server.models.tokenizer_files import find_tokenizer_files
from sale_prefill_server.observability.metrics import Metrics
from sale_prefill_server.observability.store_metrics import StoreMetrics, log_store_event
from sale_prefill_server.rpc.auth import Anonymous, Authenticator, StaticTokens
from sale_prefill_server.rpc.convert import Converter
from sale_prefill_server.rpc.inline_kv import InlineStreams
from sale_prefill_server.rpc.interceptor import CallInterceptor
from sale_prefill_server.rpc.kv_transfer_service import KvTransferServicer
from sale_prefill_server.rpc.late_binding import LateServicer
from sale_prefill_server.rpc.prefill_service import PrefillServicer
from sale_prefill_server.rpc.server_service import ServerServicer
from sale_prefill_server.rpc.session_service import SessionServicer
from sale_prefill_server.scheduler.admission import Admission
from sale_prefill_server.scheduler.loader import Loader
from sale_prefill_server.scheduler.scheduler import Scheduler
from sale_prefill_server.sessions.archive import SessionArchive
from sale_prefill_server.sessions.manager import SessionManager
from sale_prefill_server.sessions.session import Durability, Retention, SessionState
from sale_prefill_server.sessions.tiers import durabilities, open_store, recover_sessions
from sale_prefill_server.transfer.configured_segments import configured_broker
from sale_prefill_server.transfer.read_ahead import COPY_THREADS
from sale_prefill_server.transfer.segments import SegmentBroker
from sale_prefill_server.transfer.uploads import Uploads

logger = logging.getLogger(__name__)

SERVICES = (
    prefill_service_pb2.DESCRIPTOR.services_by_name["PrefillService"],
    session_service_pb2.DESCRIPTOR.services_by_name["SessionService"],
    kv_transfer_service_pb2.DESCRIPTOR.services_by_name["KvTransferService"],
    server_service_pb2.DESCRIPTOR.services_by_name["ServerService"],
)
#: Seconds between sweeps for expired leases; access to a session checks its own lease at once.
_SWEEP_SECONDS = 1.0
#: Seconds that running calls get to end at shutdown.
_GRACE_SECONDS = 2.0
#: Seconds that sessions get to be written to other tiers at shutdown.
_SAVE_SECONDS = 30.0
#: Prefill chunk by device where settings name none. Others wait for one chunk at most: about a second of a small model
#: on two cores, and of an 8B model at 128K tokens on an H100, whose kernels want some thousand rows to fill it.
_CHUNK_TOKENS = {"cpu": 2048, "cuda": 8192}


class PortInUseError(Exception):
    """A port cannot be bound. Names it and the way out."""


@dataclass(frozen=True)
class _Service:
    """Everything that exists once the model is loaded."""

    engine: Engine
    manager: SessionManager
    scheduler: Scheduler
    archive: SessionArchive | None
    loader: Loader | None
    segments: SegmentBroker


class Server:
    """One server process. `start`, then `wait_ready`, then `stop`; all on one event loop.

    gRPC answers from `start` on: health says NOT_SERVING, and calls get NOT_READY, until the model is loaded and warm.

    Args:
        config: settings.
        load: makes the model; benchmarks serve models that are in no directory.
    """

    def __init__(self, config: ServerConfig, load: Callable[[ServerConfig], LoadedModel] | None = None) -> None:
        self.config = config
        self._load_model = load or _configured_model
        self.server_id = f"{platform.node()}-{os.getpid()}"
        self.port = 0
        self.metrics_port = 0
        self._events = EventBus()
        self._metrics = Metrics(Path(config.model).name, _methods())
        self._events.subscribe(self._metrics.observe)
        self._store_metrics = StoreMetrics(self._metrics.registry)
        self._events.subscribe(self._store_metrics.observe)
        self._events.subscribe(log_store_event)
        self._health = health.aio.HealthServicer()
        self._servicers = {service.full_name: LateServicer() for service in SERVICES}
        self._service: _Service | None = None
        self._stopping = False
        self._grpc: grpc.aio.Server | None = None
        self._http: tuple[Any, threading.Thread] | None = None
        self._sweeper: asyncio.Task[None] | None = None
        self._copiers = ThreadPoolExecutor(COPY_THREADS, "kv-copy")

    async def start(self) -> None:
        """Binds both ports.

        Raises:
            PortInUseError: one of them is taken.
            ConfigError: the token file cannot be used.
        """
        config = self.config
        authenticator: Authenticator = (
            StaticTokens(Path(config.auth_tokens_file)) if config.auth_tokens_file else Anonymous()
        )
        interceptor = CallInterceptor(authenticator, self._events, self._gate, config.max_message_bytes)
        self._grpc = grpc.aio.server(interceptors=[interceptor], options=_channel_options(config.max_message_bytes))
        for service, add in zip(SERVICES, _ADDERS, strict=True):
            add(self._servicers[service.full_name], self._grpc)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._grpc)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        names = [service.full_name for service in SERVICES]
        reflection.enable_server_reflection([*names, health.SERVICE_NAME, reflection.SERVICE_NAME], self._grpc)
        self._bind()
        await self._grpc.start()

    def _bind(self) -> None:
        assert self._grpc is not None
        config = self.config
        try:
            self.port = self._grpc.add_insecure_port(f"{config.host}:{config.port}")
        except RuntimeError as error:
            raise _port_in_use("port", config.host, config.port) from error
        if not self.port:
            raise _port_in_use("port", config.host, config.port)
        try:
            self._http = start_http_server(config.metrics_port, config.metrics_host, self._metrics.registry)
        except OSError as error:
            raise _port_in_use("metrics_port", config.metrics_host, config.metrics_port) from error
        self.metrics_port = self._http[0].server_port

    async def wait_ready(self) -> None:
        """Loads and warms the model, then opens the doors.

        Raises:
            ModelError: the model cannot be used.
        """
        loop = asyncio.get_running_loop()
        with ThreadPoolExecutor(1, "load") as pool:
            self._service = await loop.run_in_executor(pool, self._load)
        if self._stopping:
            return
        self._connect(self._service)
        self._service.scheduler.start()
        self._sweeper = asyncio.create_task(self._sweep(self._service.manager, self._uploads))
        await self._set_health(health_pb2.HealthCheckResponse.SERVING)

    def _load(self) -> _Service:
        config = self.config
        if config.threads:
            torch.set_num_threads(config.threads)
        try:
            get_backend(config.attention_backend, choose_device(config.device)).description  # noqa: B018 - builds kernels
        except ValueError as error:
            raise ConfigError(f"attention_backend = {config.attention_backend!r}: {error}") from error
        model = _with_context_limit(self._load_model(config), config.max_sequence_tokens)
        capacity_bytes = config.kv_memory_bytes or _automatic_kv_bytes(model)
        profile = _profile(config, model)
        geometry = SaleConfig(query_block=get_backend(config.attention_backend, model.device).query_block)
        if profile is not None:
            geometry = profile.geometry.applied_to(geometry)
        engine = Engine(
            model,
            _pool(model, capacity_bytes),
            AttentionSettings(
                AttentionMode(config.attention),
                config.threshold,
                config.query_stride,
                None if profile is None else profile.levels[profile.default_level].error_budget,
            ),
            replace(geometry, dense_rows=config.dense_rows) if config.dense_rows else geometry,
            chunk_tokens=config.chunk_tokens or _CHUNK_TOKENS.get(model.device.type, _CHUNK_TOKENS["cpu"]),
            attention_backend=config.attention_backend,
            crossover=not config.dense_rows,
            profile=profile,
            guard=self._guard(profile),
        )
        self._log_start(engine, engine.warm_up())
        return self._service_of(engine)

    def _service_of(self, engine: Engine) -> _Service:
        config = self.config
        store = open_store(config, self._events.emit)
        archive = None if store is None else SessionArchive(store, engine.model.fingerprint)
        manager = SessionManager(
            self._events,
            archive=archive,
            pin_quota_bytes=parse_bytes("pin_quota", config.pin_quota) or None,
        )
        scheduler = Scheduler()
        segments = configured_broker(config, engine.model.device)
        if archive is None:
            return _Service(engine, manager, scheduler, None, None, segments)
        started = time.perf_counter()
        found = recover_sessions(archive, engine, manager)
        logger.info("%d sessions of earlier runs found in %.1f s", found, time.perf_counter() - started)
        return _Service(engine, manager, scheduler, archive, Loader(archive, scheduler), segments)

    def _guard(self, profile: Profile | None) -> Guard | None:
        config = self.config
        if not config.guard_share:
            return None
        settings = GuardSettings(config.guard_share, config.guard_policy == "fallback")
        return Guard(settings, profile, lambda report: self._events.emit(_guard_event(report)))

    def _log_start(self, engine: Engine, warm_up_seconds: float) -> None:
        if engine.kernel_fallback is not None:
            self._metrics.kernel_fallbacks.labels(engine.kernel_fallback).inc()
        dense = engine.geometry(engine.defaults)
        logger.info("warm in %.1f s; %d MiB for KV", warm_up_seconds, engine.pool.capacity_bytes // 2**20)
        logger.info("chunks of %d tokens", engine.chunk_tokens)
        self._log_profile(engine)
        logger.info(
            "attention by %s; rows before position %d and prompts up to %d tokens run dense",
            engine.attention_backend,
            dense.dense_rows,
            max(dense.dense_prompt_tokens, dense.dense_rows),
        )

    def _log_profile(self, engine: Engine) -> None:
        profile, defaults = engine.profile, engine.defaults
        if profile is None:
            uniform = replace(defaults, error_budget=None)
            why = "of this model" if self.config.wants_shipped_profile else "is asked for"
            logger.info("no profile %s (profile = %r): %s by default", why, self.config.profile, uniform)
            return
        logger.info("profile %s (%.12s): %s by default", profile.name, profile.digest, defaults)
        calibrated, block = profile.geometry.query_block, engine.config.query_block
        if block > calibrated:
            logger.info(
                "query blocks of %d, calibrated with %d: they keep more and lose less than it says", block, calibrated
            )
        elif block < calibrated:
            logger.warning(
                "query blocks of %d, calibrated with %d: they keep less and lose more than it says; calibrate here",
                block,
                calibrated,
            )

    def _connect(self, service: _Service) -> None:
        config, engine = self.config, service.engine
        retention = Retention(config.default_lease_seconds, durability=Durability(config.durability))
        admission = Admission(
            engine,
            service.manager,
            service.scheduler,
            self._events,
            loader=service.loader,
            default_retention=retention,
            prefix_reuse=config.prefix_reuse,
            max_queued_requests=config.max_queued_requests,
            request_retention_seconds=config.request_retention_seconds,
        )
        self._uploads = Uploads(admission.open_import, service.manager, config.upload_idle_seconds)
        converter = Converter(
            engine.model,
            self.server_id,
            engine.defaults,
            retention,
            config.max_lease_seconds,
            engine.profile is not None,
            durabilities(config),
        )
        parts = (
            PrefillServicer(
                admission,
                converter,
                InlineStreams(
                    converter,
                    self._events,
                    self._copiers,
                    service.segments,
                    config.max_message_bytes,
                    engine.chunk_tokens,
                ),
            ),
            SessionServicer(service.manager, admission, service.scheduler, converter, config.max_lease_seconds),
            KvTransferServicer(
                service.manager,
                admission,
                converter,
                self._events,
                self._copiers,
                service.segments,
                self._uploads,
                config.max_message_bytes,
            ),
            ServerServicer(
                engine,
                service.manager,
                service.scheduler,
                converter,
                find_tokenizer_files(engine.model.path),
                server_id=self.server_id,
                server_version=__version__,
                default_retention=retention,
                max_message_bytes=config.max_message_bytes,
                segment_transports=service.segments.transports,
                draining=lambda: self._stopping,
            ),
        )
        for descriptor, part in zip(SERVICES, parts, strict=True):
            self._servicers[descriptor.full_name].bind(part)
        self._events.subscribe(service.scheduler.observe)
        self._connect_gauges(service)

    def _connect_gauges(self, service: _Service) -> None:
        metrics, engine, manager, scheduler = self._metrics, service.engine, service.manager, service.scheduler
        at_scrape = metrics.read_at_scrape
        at_scrape(metrics.queued_requests, lambda: scheduler.load().queued_requests)
        at_scrape(metrics.running_requests, lambda: scheduler.load().running_requests)
        at_scrape(metrics.queued_tokens, lambda: scheduler.load().queued_tokens)
        at_scrape(metrics.kv_used_bytes.labels("device"), lambda: engine.pool.used_bytes)
        at_scrape(metrics.kv_kept_bytes.labels("device"), lambda: engine.pool.kept_bytes)
        at_scrape(metrics.kv_capacity_bytes.labels("device"), lambda: engine.pool.capacity_bytes)
        for transport in service.segments.transports:
            used_bytes = partial(service.segments.budget.used_bytes, transport)
            at_scrape(metrics.segment_bytes.labels(transport.value), used_bytes)
        for state in SessionState:
            at_scrape(metrics.sessions.labels(state.value), partial(_count, manager, state))
        if service.archive is not None:
            self._connect_store_gauges(service.archive)
        metrics.start_layers_at_zero(engine.model.kv_shape.num_layers)
        metrics.start_time.set_to_current_time()
        metrics.build_info.labels(__version__, str(engine.model.device), engine.attention_backend).set(1)
        metrics.ready.set(1)

    def _connect_store_gauges(self, archive: SessionArchive) -> None:
        metrics, at_scrape = self._metrics, self._metrics.read_at_scrape
        tiers = archive.tiers()
        self._store_metrics.start_at_zero(tiers)
        for tier, status in tiers.items():
            at_scrape(metrics.kv_used_bytes.labels(tier), partial(_used_bytes, archive, tier))
            at_scrape(self._store_metrics.queued_bytes.labels(tier), partial(_queued_bytes, archive, tier))
            metrics.kv_capacity_bytes.labels(tier).set(status.budget_bytes or 0)

    async def stop(self) -> None:
        """Refuses new work, stops what runs at its next layer, frees everything."""
        self._stopping = True
        self._metrics.ready.set(0)
        await self._set_health(health_pb2.HealthCheckResponse.NOT_SERVING)
        if self._sweeper is not None:
            self._sweeper.cancel()
        if self._service is not None:
            await asyncio.to_thread(self._service.scheduler.stop)
            if self._service.loader is not None:
                await asyncio.to_thread(self._service.loader.close)
        if self._grpc is not None:
            await self._grpc.stop(_GRACE_SECONDS)
        self._copiers.shutdown()
        if self._service is not None:
            self._uploads.close()
            await asyncio.to_thread(self._service.segments.close_all)
            self._service.manager.close()
            if self._service.archive is not None:
                await asyncio.to_thread(self._service.archive.close, _SAVE_SECONDS)
        if self._http is not None:
            self._http[0].shutdown()
            self._http[0].server_close()
            self._http[1].join()

    def _gate(self, method: str) -> None:
        if self._stopping:
            raise PrefillError(Reason.SHUTTING_DOWN, "the server is stopping: try another one", retry_after_seconds=1.0)
        if self._service is None:
            raise PrefillError(
                Reason.NOT_READY, f"{method}: the model is still loading: try again", retry_after_seconds=1.0
            )

    async def _set_health(self, status: Any) -> None:
        for name in ("", *(service.full_name for service in SERVICES)):
            await self._health.set(name, status)

    async def _sweep(self, manager: SessionManager, uploads: Uploads) -> None:
        while True:
            await asyncio.sleep(_SWEEP_SECONDS)
            manager.sweep()
            uploads.sweep()


_ADDERS: tuple[Callable[[Any, Any], None], ...] = (
    prefill_service_pb2_grpc.add_PrefillServiceServicer_to_server,
    session_service_pb2_grpc.add_SessionServiceServicer_to_server,
    kv_transfer_service_pb2_grpc.add_KvTransferServiceServicer_to_server,
    server_service_pb2_grpc.add_ServerServiceServicer_to_server,
)


def _methods() -> list[tuple[str, str, str]]:
    kinds = {(False, False): "unary", (False, True): "server_stream", (True, False): "client_stream"}
    return [
        (service.full_name, method.name, kinds[method.client_streaming, method.server_streaming])
        for service in SERVICES
        for method in service.methods
    ]


def _channel_options(max_message_bytes: int) -> list[tuple[str, int]]:
    return [
        # Twice the limit, so that a message somewhat over it is refused by the interceptor, with details.
        ("grpc.max_receive_message_length", 2 * max_message_bytes),
        ("grpc.max_send_message_length", max_message_bytes),
        ("grpc.keepalive_time_ms", 30_000),
        ("grpc.keepalive_timeout_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
        ("grpc.so_reuseport", 0),  # a second server on this port must fail, not share it
    ]


def _port_in_use(setting: str, host: str, port: int) -> PortInUseError:
    flag = "--" + setting.replace("_", "-")
    try:
        with socket.create_server((host, port)):
            cause = "cannot be bound"
    except OSError as error:
        cause = f"cannot be bound ({error.strerror})"
    return PortInUseError(
        f"{host}:{port} {cause}: stop what listens there, or choose another with {flag} (0 takes a free one)"
    )


def _count(manager: SessionManager, state: SessionState) -> float:
    return manager.states()[state]


def _profile(config: ServerConfig, model: LoadedModel) -> Profile | None:
    if config.profile == "none" or (config.profile == "auto" and not config.wants_shipped_profile):
        return None
    fingerprint = ModelFingerprint.of(model.module)
    try:
        if config.profile == "auto":
            return shipped_profile(fingerprint)
        profile = load_profile(Path(config.profile))
        profile.check_fits(fingerprint)
    except ProfileError as error:
        raise ConfigError(f"profile = {config.profile!r}: {error}") from error
    return profile


def _guard_event(report: GuardReport) -> GuardLooked:
    return GuardLooked(
        tuple(found.kept_mass for found in report.tiles),
        tuple(found.mean_error for found in report.tiles),
        tuple((alert.layer, alert.dense) for alert in report.alerts),
    )


def _configured_model(config: ServerConfig) -> LoadedModel:
    source = resolve_model(config.model, Path(config.cache_dir) if config.cache_dir else None, logger.info)
    started = time.perf_counter()
    model = load_model(
        source.path,
        source.name,
        device=choose_device(config.device),
        dtype=config.dtype,
        trust_remote_code=config.trust_remote_code,
    )
    logger.info("loaded %s on %s in %.1f s", model.name, model.device, time.perf_counter() - started)
    return model


def _with_context_limit(model: LoadedModel, limit: int) -> LoadedModel:
    if not limit or limit >= model.max_sequence_tokens:
        return model
    return replace(model, max_sequence_tokens=limit)


def _pool(model: LoadedModel, capacity_bytes: int) -> KvPool:
    try:
        return KvPool(model.kv_shape, capacity_bytes)
    except KvCapacityError as error:
        raise ConfigError(
            f"kv_memory: {capacity_bytes} bytes hold no page of {model.kv_shape.page_bytes} bytes, or are more than "
            f"{model.device} can give ({error}); choose another --kv-memory"
        ) from error


def _used_bytes(archive: SessionArchive, tier: str) -> int:
    return archive.tiers()[tier].used_bytes


def _queued_bytes(archive: SessionArchive, tier: str) -> int:
    return archive.tiers()[tier].queued_bytes


def _automatic_kv_bytes(model: LoadedModel) -> int:
    if model.device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(model.device)
        return free_bytes // 2
    return int(psutil.virtual_memory().available) // 2
