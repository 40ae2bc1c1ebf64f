"""Kernels built on this machine: cached by content, safe against each other, and replaced by the reference without."""

from __future__ import annotations

import ctypes
import logging
import multiprocessing
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sale_attention import AttentionRequest, LayerPolicy, attend, get_backend, jit
from sale_attention.cpu import CpuBackend, available_isas, library, load_kernels
from sale_attention.jit import BuildPlan, KernelBuildError, build, cuda_toolkit, cuda_wheels
from tests.unit.attention.naive import SMALL, Shape, random_problem


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildPlan:
    """A library of one function, and a cache of its own."""
    monkeypatch.setenv("SALE_PREFILL_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.mkdir()
    (source / "answer.cpp").write_text('extern "C" int answer() { return ANSWER; }\n')
    return BuildPlan("answer", ("answer.cpp",), source, compile_flags=("-DANSWER=42",))


def answer(file: Path) -> int:
    return int(ctypes.CDLL(str(file)).answer())


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


def test_a_library_is_built_once_and_found_again(plan: BuildPlan, tmp_path: Path) -> None:
    first = build(plan)
    built_at = first.stat().st_mtime_ns
    assert answer(first) == 42
    assert build(plan) == first
    assert first.stat().st_mtime_ns == built_at
    assert folders(tmp_path / "cache" / "kernels") == [first.parent.name]


def test_other_sources_or_flags_are_another_library(plan: BuildPlan) -> None:
    first = build(plan)
    other_flags = build(replace(plan, compile_flags=("-DANSWER=7",)))
    (plan.source_root / "note.h").write_text("// any file below the root counts\n")
    other_sources = build(plan)
    assert len({first, other_flags, other_sources}) == 3
    assert (answer(first), answer(other_flags), answer(other_sources)) == (42, 7, 42)


def _build_and_answer(plan: BuildPlan) -> tuple[int, int]:
    file = build(plan)
    return answer(file), file.stat().st_mtime_ns


def test_processes_that_want_the_same_library_share_one_build(plan: BuildPlan) -> None:
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        results = pool.map(_build_and_answer, [plan, plan])
    assert [result[0] for result in results] == [42, 42]
    assert results[0][1] == results[1][1]


def test_a_compile_error_names_the_log_and_leaves_no_library(plan: BuildPlan, tmp_path: Path) -> None:
    (plan.source_root / "answer.cpp").write_text("int answer( {")
    with pytest.raises(
        KernelBuildError, match=r"building answer with .* failed; the compiler's output is in (.*\.log)"
    ):
        build(plan)
    cache = tmp_path / "cache" / "kernels"
    (log,) = cache.glob("*.log")
    assert "error:" in log.read_text()
    assert folders(cache) == []


def test_a_cache_that_cannot_be_written_is_named(plan: BuildPlan, tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    with pytest.raises(KernelBuildError, match=r"cannot be used .* name another folder in SALE_PREFILL_CACHE"):
        build(plan)


def test_a_library_that_is_there_needs_no_compiler(plan: BuildPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    first = build(plan)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert build(plan) == first


def test_no_compiler_says_what_to_install(plan: BuildPlan, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(KernelBuildError, match=r"no C\+\+ compiler .* apt-get install g\+\+"):
        build(plan)


TOOLKIT = ("bin/nvcc", "include/cuda_runtime.h")
WHEELS = (*TOOLKIT, "include/crt/host_config.h", "include/cccl/nv/target", "nvvm/bin/cicc")


def lay_out(home: Path, files: tuple[str, ...]) -> Path:
    for name in files:
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).touch(mode=0o755)
    return home


@pytest.fixture
def homes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Path]:
    """A toolkit in each place where one may be."""
    places = ("CUDA_HOME", "PATH", "system")
    found = {place: lay_out(tmp_path / place, TOOLKIT) for place in places}
    found["wheels"] = lay_out(tmp_path / "site-packages" / "nvidia" / "cu13", WHEELS)
    monkeypatch.setenv("CUDA_HOME", str(found["CUDA_HOME"]))
    monkeypatch.setenv("PATH", str(found["PATH"] / "bin"))
    monkeypatch.setattr(jit, "SYSTEM_CUDA_TOOLKIT", found["system"])
    monkeypatch.setattr(jit, "cuda_wheels", lambda: found["wheels"])
    return found


def without(*homes: Path) -> None:
    for home in homes:
        (home / "bin" / "nvcc").unlink()


@pytest.mark.parametrize("first", range(4), ids=["CUDA_HOME", "PATH", "system", "wheels"])
def test_cuda_toolkits_are_taken_in_order(homes: dict[str, Path], first: int) -> None:
    in_order = list(homes.values())
    without(*in_order[:first])
    assert cuda_toolkit() == in_order[first]


def test_a_script_on_path_that_calls_nvcc_is_no_toolkit(homes: dict[str, Path]) -> None:
    without(homes["CUDA_HOME"])
    (homes["PATH"] / "include" / "cuda_runtime.h").unlink()
    assert cuda_toolkit() == homes["system"]


def test_a_link_on_path_leads_to_the_toolkit(homes: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    linked = homes["PATH"].parent / "linked" / "bin"
    linked.mkdir(parents=True)
    (linked / "nvcc").symlink_to(homes["PATH"] / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(linked))
    without(homes["CUDA_HOME"])
    assert cuda_toolkit() == homes["PATH"]


def test_wheels_that_lack_a_part_are_refused_by_its_name(homes: dict[str, Path]) -> None:
    without(homes["CUDA_HOME"], homes["PATH"], homes["system"])
    (homes["wheels"] / "include/cccl/nv/target").unlink()
    with pytest.raises(KernelBuildError, match=r"the wheels in .*cu13 lack include/cccl/nv/target: install"):
        cuda_toolkit()


def test_no_cuda_toolkit_says_what_to_install(
    plan: BuildPlan, homes: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    without(homes["CUDA_HOME"], homes["PATH"], homes["system"])
    lay_out(homes["PATH"], ("bin/g++",))
    monkeypatch.setattr(jit, "cuda_wheels", lambda: None)
    (plan.source_root / "answer.cu").touch()
    with pytest.raises(KernelBuildError, match=r"lack bin/nvcc: .* or pip install sale-prefill\[cuda-build\]"):
        build(replace(plan, sources=("answer.cu",)))


@pytest.fixture
def cuda_plan(plan: BuildPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildPlan:
    """A library of one kernel for the wheels' nvcc; empty ones stand for torch's, which a build without CUDA lacks."""
    wheels = cuda_wheels()
    assert wheels is not None
    monkeypatch.setenv("CUDA_HOME", str(wheels))
    ctypes.CDLL(str(next((wheels / "lib").glob("libcudart.so.*"))))  # as torch with CUDA does
    for name in ("libc10_cuda.so", "libtorch_cuda.so"):
        subprocess.run(["g++", "-shared", "-x", "c++", "/dev/null", "-o", tmp_path / name], check=True)
    (plan.source_root / "answer.cu").write_text(
        "__global__ void kernel() {}\n"
        'extern "C" int launch() { kernel<<<1, 1>>>(); return cudaGetLastError(); }\n'
        'extern "C" int answer() { return ANSWER; }\n'
    )
    link_flags = (f"-L{tmp_path}", f"-Wl,-rpath,{tmp_path}")
    cuda_flags = ("-DANSWER=42", "-gencode=arch=compute_80,code=sm_80")
    return replace(plan, sources=("answer.cu",), cuda_flags=cuda_flags, link_flags=link_flags)


def test_the_wheels_build_a_cuda_library(cuda_plan: BuildPlan) -> None:
    assert answer(build(cuda_plan)) == 42


def test_a_cuda_compile_error_names_nvcc_and_the_log(cuda_plan: BuildPlan, tmp_path: Path) -> None:
    (cuda_plan.source_root / "answer.cu").write_text("int answer( {")
    with pytest.raises(KernelBuildError, match=r"building answer with .*/bin/nvcc failed; the compiler's output is in"):
        build(cuda_plan)
    (log,) = (tmp_path / "cache" / "kernels").glob("*.log")
    assert "error" in log.read_text()


def test_without_kernels_the_reference_computes_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    monkeypatch.setenv("SALE_PREFILL_CACHE", str(tmp_path))
    library.load_library.cache_clear()
    backend = CpuBackend()
    query, kv = random_problem(Shape(rows=300))
    monkeypatch.setitem(get_backend.__globals__["_REGISTRY"], "cpu", backend)
    with caplog.at_level(logging.WARNING):
        results = [attend(query, kv, config=SMALL, backend="cpu") for _ in range(2)]
    library.load_library.cache_clear()
    expected = attend(query, kv, config=SMALL, backend="reference")
    assert all(torch.equal(result.output, expected.output) for result in results)
    assert backend.description == "reference"
    (record,) = caplog.records
    assert "slow torch reference computes: no C++ compiler" in record.message


def test_heads_that_no_kernel_covers_are_said_to_run_on_the_reference() -> None:
    assert CpuBackend().runs_on(64, torch.bfloat16, torch.device("cpu")) == CpuBackend().description
    assert CpuBackend().runs_on(40, torch.bfloat16, torch.device("cpu")) == "reference"
    assert CpuBackend().runs_on(64, torch.float64, torch.device("cpu")) == "reference"


def test_every_machine_runs_the_portable_kernels() -> None:
    assert available_isas()[-1] == "portable"
    assert CpuBackend().description == f"cpu-{load_kernels().isa}"


def test_an_instruction_set_can_be_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALE_PREFILL_CPU_ISA", "portable")
    assert CpuBackend().description == "cpu-portable"
    assert CpuBackend("portable").description == "cpu-portable"


def test_the_reference_serves_processors_that_have_no_vector_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SALE_PREFILL_CPU_ISA", raising=False)
    monkeypatch.setattr(library, "_supported", lambda loaded: [("portable", 3)])
    assert CpuBackend().description == "reference"
    assert CpuBackend("portable").description == "cpu-portable"


def test_the_cpu_backend_declines_other_devices() -> None:
    query, kv = random_problem(Shape(rows=300))
    elsewhere = AttentionRequest(query.to("meta"), kv, LayerPolicy.uniform(2), SMALL)
    assert CpuBackend().supports(elsewhere) == "it computes on CPU tensors, not on meta ones"


def test_an_instruction_set_that_does_not_run_here_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SALE_PREFILL_CPU_ISA", "neon")
    with pytest.raises(
        ValueError, match=r"'neon' \(SALE_PREFILL_CPU_ISA\) does not run on this machine; it runs .*portable"
    ):
        load_kernels()
