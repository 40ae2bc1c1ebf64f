"""CUDA kernels without a GPU: each compiles for each target, stays in registers, and has the instructions it claims.

The compiler is that of the pinned wheels whatever else the machine has, so that registers come out alike everywhere.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from sale_attention.cuda import abi
from sale_attention.cuda.library import ARCHITECTURES, build_plan
from sale_attention.jit import cuda_wheels, kernel_source_root

pytestmark = pytest.mark.slow

CUDA = kernel_source_root() / "cuda"
SM80, SM90 = ("80", "86", "89"), ("90a",)

#: Source below `csrc/cuda/` -> targets -> opcodes that must be there; sources and opcodes are patterns (`fnmatch`).
#: None says that a source is host code. A source without an entry fails a test.
INSTRUCTIONS: dict[str, dict[tuple[str, ...], tuple[str, ...]] | None] = {
    "api.cu": None,
    "layer.cu": None,
    "count_blocks.cu": {SM80 + SM90: ("POPC", "REDUX*")},
    "key_centre.cu": {SM80 + SM90: ("DADD",)},
    "quantise_key.cu": {SM80 + SM90: ("LDG.E.128*", "MUFU.RCP")},
    "query_rows.cu": {
        SM80 + SM90: ("HMMA.16816.F32.BF16", "HMMA.16816.F32", "LDGSTS.E.BYPASS*.128*", "LDS.128", "MUFU.EX2")
    },
    "quantise_4bit.cu": {SM80 + SM90: ("LDG.E.128*", "F2I*")},
    # Hopper has no 4-bit tensor cores: there the same instruction is two of the 8-bit ones.
    "sampled.cu": {SM80 + SM90: ("IMMA.16832.S8.S8", "LDGSTS.E*.128*", "MUFU.EX2")},
    "select_4bit.cu": {SM80: ("IMMA.16864.S4.S4",), SM90: ("IMMA.16832.S8.S8",)},
    "decode.cu": {SM80 + SM90: ("HMMA.16816.F32*", "LDGSTS.E*.128*", "MUFU.EX2")},
    "sm80/select_s8.cu": {SM80: ("IMMA.16832.S8.S8", "LDGSTS.E*.128*")},
    "sm80/attend.cu": {SM80: ("HMMA.16816.F32.BF16", "HMMA.16816.F32", "LDGSTS.E*.128*", "MUFU.EX2")},
    "sm90/select_s8.cu": {SM90: ("IGMMA.64x*x32.S8.S8", "UTMALDG.4D.MULTICAST", "USETMAXREG*")},
    "sm90/attend.cu": {
        SM90: ("HGMMA.64x128x16.F32.BF16", "HGMMA.64x128x16.F32", "UTMALDG.4D", "USETMAXREG*", "MUFU.EX2")
    },
    "sm90/tensor_map.cu": None,
}

_OPCODE = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[0-9T]+\s+)?([A-Z][A-Z0-9_]*(?:\.\w+)*)", re.MULTILINE)
_FUNCTION = re.compile(
    r"Function properties for (\w+)\n\s+(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes"
)
_COMPLAINT = re.compile(r".*(?:warning|Potential Performance Loss|\(C75\d\d\)).*", re.IGNORECASE)


def sources_of(target: str) -> list[str]:
    """Names below `csrc/cuda/`."""
    return [source.removeprefix("cuda/") for source in build_plan(target).sources]


BUILDS = [(target, source) for target in ARCHITECTURES for source in sources_of(target)]


@dataclass(frozen=True)
class Compiled:
    """What came of one source for one target."""

    object_file: Path
    log: str

    def in_memory(self) -> list[str]:
        """Kernels with a stack frame or spills, and bytes of each."""
        return [
            f"{name}: stack frame {frame}, spill stores {stores}, spill loads {loads}"
            for name, frame, stores, loads in self._properties()
            if (frame, stores, loads) != ("0", "0", "0")
        ]

    def kernels(self) -> list[str]:
        """Functions for the device."""
        return [name for name, *_ in self._properties()]

    def complaints(self) -> list[str]:
        """Warnings, and what ptxas says where it runs one wgmma after the other."""
        return _COMPLAINT.findall(self.log)

    def opcodes(self) -> set[str]:
        """Instructions in the machine code, with their modifiers."""
        disassembly = run("cuobjdump", "-sass", self.object_file)
        assert disassembly.returncode == 0, disassembly.stdout
        return set(_OPCODE.findall(disassembly.stdout))

    def _properties(self) -> list[tuple[str, str, str, str]]:
        return _FUNCTION.findall(self.log)


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    """Run one of the tools; stdout has stderr in it. cuobjdump calls nvdisasm, so both are on PATH."""
    environment = {**os.environ, "PATH": f"{tools()}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def tools() -> Path:
    """Folder of nvcc and cuobjdump."""
    wheels = cuda_wheels()
    assert wheels is not None, "NVIDIA's wheels are not installed: run make setup"
    return wheels / "bin"


def compile_for(target: str, source: Path, folder: Path) -> Compiled:
    """Compile as `jit.build` does, and have ptxas say what it used."""
    from torch.utils.cpp_extension import COMMON_NVCC_FLAGS

    plan = build_plan(target)
    object_file = folder / f"{source.stem}.sm{target}.o"
    includes = [f"-I{plan.source_root / name}" for name in plan.include_dirs]
    flags = (*COMMON_NVCC_FLAGS, *plan.cuda_flags, *includes, "-Xcompiler=-fPIC", "-Xptxas=-v")
    result = run("nvcc", *flags, "-c", source, "-o", object_file)
    assert result.returncode == 0, f"{source.name} does not compile for sm_{target}:\n{result.stdout}"
    return Compiled(object_file, result.stdout)


class Builds:
    """All objects of all targets, compiled side by side, each once."""

    def __init__(self, pool: ThreadPoolExecutor, folder: Path) -> None:
        self._jobs: dict[tuple[str, str], Future[Compiled]] = {
            (target, source): pool.submit(compile_for, target, CUDA / source, folder) for target, source in BUILDS
        }

    def get(self, target: str, source: str) -> Compiled:
        return self._jobs[target, source].result()


@pytest.fixture(scope="module")
def builds(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Builds]:
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        yield Builds(pool, tmp_path_factory.mktemp("objects"))
        pool.shutdown(cancel_futures=True)


each_build = pytest.mark.parametrize(("target", "source"), BUILDS, ids=[f"sm_{t}-{s}" for t, s in BUILDS])


@pytest.mark.parametrize("source", sorted(str(file.relative_to(CUDA)) for file in CUDA.rglob("*.cu")))
def test_every_source_has_one_entry_in_the_table_and_a_target(source: str) -> None:
    assert len(entries_for(source)) == 1, "say in INSTRUCTIONS what this source compiles to"
    assert [target for target, compiled in BUILDS if compiled == source] != []


def entries_for(source: str) -> list[str]:
    return [pattern for pattern in INSTRUCTIONS if fnmatchcase(source, pattern)]


@pytest.mark.parametrize("target", ARCHITECTURES)
def test_sources_of_a_target_differ_in_name(target: str) -> None:
    """torch names objects after the file without its folder."""
    stems = [Path(source).stem for source in sources_of(target)]
    assert len(set(stems)) == len(stems)


@each_build
def test_no_kernel_keeps_registers_in_memory(builds: Builds, target: str, source: str) -> None:
    compiled = builds.get(target, source)
    assert not compiled.in_memory(), "\n".join(compiled.in_memory())
    assert not compiled.complaints(), "\n".join(compiled.complaints())


@each_build
def test_the_machine_code_has_the_instructions_it_is_written_for(builds: Builds, target: str, source: str) -> None:
    (entry,) = entries_for(source)
    by_targets = INSTRUCTIONS[entry]
    compiled = builds.get(target, source)
    if by_targets is None:
        assert compiled.kernels() == []
        return
    (expected,) = [patterns for targets, patterns in by_targets.items() if target in targets]
    found = compiled.opcodes()
    assert [pattern for pattern in expected if not any(fnmatchcase(opcode, pattern) for opcode in found)] == []


# A target whose folder is not there yet has nothing to link.
@pytest.mark.parametrize("target", [name for name, folder in ARCHITECTURES.items() if (CUDA / folder).is_dir()])
def test_the_library_of_a_target_loads_and_has_every_entry_point(builds: Builds, target: str, tmp_path: Path) -> None:
    objects = [builds.get(target, source).object_file for source in sources_of(target)]
    library = tmp_path / "library.so"
    runtime = [f"-L{tools().parent / 'lib'}", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
    link = run("g++", "-shared", "-Wl,--no-undefined", *objects, *runtime, "-o", library)
    assert link.returncode == 0, link.stdout
    abi.declare(ctypes.CDLL(str(library)))


#: Functions that take another function's structure.
SHARED = {"quantise_key_4bit": "QuantiseKey", "quantise_query_4bit": "QuantiseQuery4", "select_4bit": "Select4"}


def test_the_package_packs_structures_as_the_header_lays_them_out(tmp_path: Path) -> None:
    checks = "\n".join(
        f"static_assert(sizeof(SaleCuda{SHARED.get(name, name.title().replace('_', ''))}) == {layout.size});"
        for name, layout in abi.CALLS.items()
    )
    source = tmp_path / "sizes.cpp"
    source.write_text(f'#include "sale_prefill/cuda_api.h"\n{checks}\n')
    compiled = run("g++", "-std=c++17", "-fsyntax-only", f"-I{kernel_source_root() / 'include'}", source)
    assert compiled.returncode == 0, compiled.stdout


def test_the_checks_find_what_they_are_for(tmp_path: Path) -> None:
    spilling = tmp_path / "spilling.cu"
    spilling.write_text(
        "__global__ void __launch_bounds__(1024, 2) spilling(float* x) {\n"
        "  float kept[64];\n"
        "  for (int i = 0; i < 64; ++i) kept[i] = x[i * 1024 + threadIdx.x];\n"
        "  __syncthreads();\n"
        "  for (int i = 0; i < 64; ++i) x[i * 1024 + threadIdx.x] = kept[63 - i] * kept[i];\n"
        "}\n"
    )
    compiled = compile_for("80", spilling, tmp_path)
    (found,) = compiled.in_memory()
    assert re.fullmatch(r"\w+spilling\w+: stack frame \d+, spill stores [1-9]\d*, spill loads [1-9]\d*", found)
    assert {"FMUL", "STL", "LDL"} <= {opcode.split(".")[0] for opcode in compiled.opcodes()}

    serialised = (
        "ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized due to"
    )
    assert Compiled(Path(), f"ptxas info    : 0 bytes gmem\n{serialised}\n").complaints() == [serialised]
