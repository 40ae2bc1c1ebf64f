"""Native code built on the machine that runs it: compiled once, cached by content, found again by every process."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

CACHE_VARIABLE = "SALE_PREFILL_CACHE"

SYSTEM_CUDA_TOOLKIT = Path("/usr/local/cuda")
_NEEDED_FROM_TOOLKIT = ("bin/nvcc", "include/cuda_runtime.h")
#: The wheels of the `cuda-build` extra make up a toolkit; torch or another package may have brought some of them.
_NEEDED_FROM_WHEELS = (*_NEEDED_FROM_TOOLKIT, "include/crt/host_config.h", "include/cccl/nv/target", "nvvm/bin/cicc")


class KernelBuildError(RuntimeError):
    """Kernels could not be built. The message says why and names the log, where there is one."""


@dataclass(frozen=True)
class BuildPlan:
    """What makes one shared library; everything here, and the contents of all sources, enter the cache key.

    Attributes:
        name: of the library, an identifier.
        sources: files to compile, relative to `source_root`.
        source_root: folder that they are in.
        include_dirs: relative to `source_root`; every file below them, and below the sources' folders, enters the key.
        compile_flags: for C++ sources.
        cuda_flags: for CUDA sources, the target architecture among them.
        link_flags: for the link step.
    """

    name: str
    sources: tuple[str, ...]
    source_root: Path
    include_dirs: tuple[str, ...] = ()
    compile_flags: tuple[str, ...] = ()
    cuda_flags: tuple[str, ...] = ()
    link_flags: tuple[str, ...] = ()

    @property
    def needs_cuda(self) -> bool:
        """Whether there are CUDA sources."""
        return any(source.endswith(".cu") for source in self.sources)


def kernel_source_root() -> Path:
    """`csrc/`: inside an installed package, or at the top of a checkout."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "csrc", here.parents[1] / "csrc"):
        if (candidate / "include").is_dir():
            return candidate
    raise KernelBuildError(f"kernel sources are neither in {here / 'csrc'} nor in {here.parents[1] / 'csrc'}")


def kernel_cache_dir() -> Path:
    """`$SALE_PREFILL_CACHE/kernels`, else `kernels` in the user's cache folder for sale-prefill."""
    if override := os.environ.get(CACHE_VARIABLE):
        return Path(override).expanduser() / "kernels"
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "sale-prefill" / "kernels"


def build(plan: BuildPlan) -> Path:
    """The shared library of `plan`, from the cache or built now through `torch.utils.cpp_extension` and ninja.

    Processes that want the same library wait for each other; a build that is killed leaves nothing that counts. A
    library that is there already needs no compiler. A failed build's log is `<cache>/<name>-<key>.log`.

    Raises:
        KernelBuildError: no compiler, no CUDA toolkit (for CUDA sources), no ninja, an unusable cache folder, or a
            compile error; says which.
    """
    name = f"{plan.name}-{_cache_key(plan)}"
    try:
        cache = kernel_cache_dir()
        library = cache / name / f"{plan.name}.so"
        if library.exists():
            return library
        compiler = _compiler()
        toolkit = cuda_toolkit() if plan.needs_cuda else None
        cache.mkdir(parents=True, exist_ok=True)
        with _exclusive(cache / f".{name}.lock"):
            if not library.exists():
                _build_into(library, plan, compiler, toolkit, cache / f"{name}.log")
    except KernelBuildError:
        raise
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory
        raise KernelBuildError(
            f"the kernel cache cannot be used ({error}): make it writable, or name another folder in {CACHE_VARIABLE}"
        ) from error
    return library


def _compiler() -> str:
    wanted = os.environ.get("CXX", "g++")
    found = shutil.which(wanted) or shutil.which("c++")
    if found is None:
        raise KernelBuildError(
            f"no C++ compiler ({wanted} or c++) on PATH: install g++ 11 or newer (Debian, Ubuntu: apt-get install g++) "
            "or name it in CXX"
        )
    return found


def cuda_toolkit() -> Path:
    """Folder of the CUDA toolkit: `$CUDA_HOME`, that of `nvcc` on PATH, /usr/local/cuda, else that of the wheels.

    Raises:
        KernelBuildError: there is none; says what is missing and how to get it.
    """
    candidates = [Path(home) for home in (os.environ.get("CUDA_HOME"),) if home]
    if nvcc := shutil.which("nvcc"):
        candidates += [Path(nvcc).parents[1], Path(nvcc).resolve().parents[1]]
    for home in (*candidates, SYSTEM_CUDA_TOOLKIT):
        if not _missing(home, _NEEDED_FROM_TOOLKIT):
            return home
    wheels = cuda_wheels()
    missing = "bin/nvcc" if wheels is None else ", ".join(_missing(wheels, _NEEDED_FROM_WHEELS))
    if wheels is None or missing:
        raise KernelBuildError(
            f"no CUDA toolkit in $CUDA_HOME, with nvcc on PATH, or in {SYSTEM_CUDA_TOOLKIT}, and the wheels in "
            f"{wheels or 'this environment'} lack {missing}: install the CUDA toolkit, or "
            "pip install sale-prefill[cuda-build]"
        )
    return wheels


def cuda_wheels() -> Path | None:
    """The folder that NVIDIA's wheels share, such as `nvidia/cu13`; None where there are no such wheels."""
    spec = importlib.util.find_spec("nvidia")
    roots = [] if spec is None else [Path(root) for root in spec.submodule_search_locations or ()]
    return max((folder for root in roots for folder in root.glob("cu[0-9]*")), default=None)


def _missing(home: Path, needed: Sequence[str]) -> list[str]:
    return [name for name in needed if not (home / name).exists()]


def _cache_key(plan: BuildPlan) -> str:
    """What the library is made of and for; not the compiler, so that a machine without one finds a library, too."""
    digest = hashlib.sha256()
    flags = (*plan.compile_flags, *plan.cuda_flags, *plan.link_flags)
    for part in (plan.name, *plan.sources, *plan.include_dirs, *flags, platform.machine(), *platform.libc_ver()):
        digest.update(part.encode() + b"\0")
    folders = {plan.source_root / name for name in plan.include_dirs}
    folders |= {(plan.source_root / source).parent for source in plan.sources}
    for file in sorted({file for folder in folders for file in folder.rglob("*") if file.is_file()}):
        digest.update(str(file.relative_to(plan.source_root)).encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:20]


@contextmanager
def _exclusive(lock_file: Path) -> Iterator[None]:
    """Holds a lock that the system drops with its process, however that ends."""
    with lock_file.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _build_into(library: Path, plan: BuildPlan, compiler: str, toolkit: Path | None, log_file: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix=f".{plan.name}-", dir=library.parent.parent))
    try:
        started = time.perf_counter()
        _run_ninja(plan, folder, compiler, toolkit)
        # torch numbers the file where this process has built the name before.
        next(folder.glob(f"{plan.name}*.so")).rename(folder / library.name)
        (folder / "built-in-seconds").write_text(f"{time.perf_counter() - started:.1f}\n")
        shutil.rmtree(library.parent, ignore_errors=True)
        folder.chmod(0o755)  # others may share the cache
        folder.rename(library.parent)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        log_file.write_text(f"{error}\n{error.__cause__ or ''}\n")
        used = compiler if toolkit is None else toolkit / "bin" / "nvcc"
        raise KernelBuildError(
            f"building {plan.name} with {used} failed; the compiler's output is in {log_file}"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run_ninja(plan: BuildPlan, folder: Path, compiler: str, toolkit: Path | None) -> None:
    from torch.utils import cpp_extension

    runtime_flags: list[str] = []
    if toolkit is not None:
        cpp_extension.CUDA_HOME = str(toolkit)  # torch looked for it when it was imported, and not in the wheels
        runtime_flags = _link_flags_for_runtime(toolkit, folder)
    with _environment(CXX=compiler, PATH=_path_with_ninja()):
        cpp_extension.load(
            name=plan.name,
            sources=[str(plan.source_root / source) for source in plan.sources],
            extra_include_paths=[str(plan.source_root / folder) for folder in plan.include_dirs],
            extra_cflags=list(plan.compile_flags),
            extra_cuda_cflags=list(plan.cuda_flags),
            extra_ldflags=[*plan.link_flags, *runtime_flags],
            build_directory=str(folder),
            is_python_module=False,
        )


def _link_flags_for_runtime(toolkit: Path, folder: Path) -> list[str]:
    """What makes torch's `-lcudart` work where the runtime has its versioned name only, as in the wheels."""
    versioned = sorted((toolkit / "lib").glob("libcudart.so.*"))
    if not versioned or any((toolkit / lib / "libcudart.so").exists() for lib in ("lib64", "lib")):
        return []
    (folder / "libcudart.so").symlink_to(versioned[-1])
    return [f"-L{folder}"]


def _path_with_ninja() -> str:
    """PATH, with the folder of the `ninja` package's binary first: a virtual environment may not be activated."""
    folders: Sequence[str] = [os.environ.get("PATH", "")]
    try:
        import ninja

        folders = [ninja.BIN_DIR, *folders]
    except ImportError:
        pass
    return os.pathsep.join(folders)


@contextmanager
def _environment(**values: str) -> Iterator[None]:
    saved = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
