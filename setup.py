"""Compile `fastfisher._native` from csrc/, or say in one sentence why the package goes without it.

FASTFISHER_BUILD=auto    compile what can be compiled, and go on without the rest (the default)
FASTFISHER_BUILD=native  fail where the C++ cannot be compiled, or a CUDA toolkit is there and cannot compile its part
FASTFISHER_BUILD=cuda    fail where either cannot be compiled
FASTFISHER_BUILD=none    do not compile

The outcome is written to fastfisher/_build_info.py, which `fastfisher doctor` repeats.  torch is not needed here: csrc
knows nothing of it.  Each instruction set is one source file with its own flags; the kernels choose among them when
they run, so one build serves every machine of an architecture.  The CUDA files are compiled wherever a toolkit is, for
FASTFISHER_CUDA_ARCHS, with or without a GPU in this machine.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))

from fastfisher import environment  # noqa: E402  (the source tree is not on the path of an isolated build)

# -ffast-math stays out: kernels detect failed blocks by their NaN.
COMMON = shlex.split("-O3 -std=c++17 -fPIC -fvisibility=hidden -ffp-contract=fast -pthread -Wall -Wextra")
X86 = ("x86_64", "amd64", "i686")
ARM = ("aarch64", "arm64")
# file stem -> (machines it is compiled for, flags); a file not listed is portable
ISA_FLAGS = {
    "kernels_avx2": (X86, shlex.split("-mavx2 -mfma -mf16c")),
    # g++ 12 warns about the deliberately undefined registers of its own AVX-512 header.
    "kernels_avx512": (
        X86,
        shlex.split(
            "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mf16c -mprefer-vector-width=512 "
            "-Wno-uninitialized -Wno-maybe-uninitialized"
        ),
    ),
    "kernels_neon": (ARM, []),
}


# No -use_fast_math here either; --threads compiles for the architectures side by side.
CUDA = shlex.split("-O3 -std=c++17 -Xcompiler -fPIC,-fvisibility=hidden --threads 3")
TOOLKITS = (Path("/usr/local/cuda"),)  # where to look when neither CUDA_HOME nor PATH names one


class BuildUnavailableError(Exception):
    """The extension cannot be built; the message is the sentence that `fastfisher doctor` repeats."""


class CudaUnavailableError(BuildUnavailableError):
    """The extension can only be built without its CUDA part; the message says why."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: where it lies, its release, and the architectures to compile for, in ascending order."""

    folder: Path
    release: str
    archs: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.folder} ({self.release})"

    def nvcc(self, host_compiler: str) -> list[str]:
        """The command that compiles for the architectures, with PTX of the newest for those yet to come."""
        code = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in self.archs]
        newest = self.archs[-1]
        code.append(f"-gencode=arch=compute_{newest},code=compute_{newest}")
        return [str(self.folder / "bin" / "nvcc"), "-ccbin", host_compiler, *CUDA, *code]

    def link(self) -> list[str]:
        """What links the CUDA runtime into the extension, its symbols hidden from a torch that brings its own."""
        libraries = [
            *self.folder.glob("lib*/libcudart_static.a"),
            *self.folder.glob("targets/*/lib/libcudart_static.a"),
        ]
        if not libraries:
            raise CudaUnavailableError(f"the CUDA toolkit {self.folder} has no libcudart_static.a")
        return [str(libraries[0]), "-Wl,--exclude-libs,ALL", "-ldl", "-lrt"]


def kernel_sources() -> dict[Path, list[str]]:
    """The files of csrc/cpu that this machine's architecture can compile, each with its flags."""
    machine = platform.machine().lower()
    sources = {}
    for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        machines, flags = ISA_FLAGS.get(path.stem, ((machine,), []))
        if machine in machines:
            sources[path] = flags
    return sources


def cuda_sources() -> dict[Path, list[str]]:
    """The files of csrc/cuda, none with flags of its own."""
    return {path: [] for path in sorted((ROOT / "csrc" / "cuda").glob("*.cu"))}


def find_compiler() -> list[str]:
    """The C++ compiler as a command: $CXX if set, else Python's own, else c++, g++ or clang++."""
    asked = os.environ.get("CXX")
    candidates = [asked] if asked else [sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    for candidate in filter(None, candidates):
        command = shlex.split(candidate)
        if shutil.which(command[0]):
            return command
    if asked:
        raise BuildUnavailableError(f"the C++ compiler named by CXX was not found: {asked}")
    raise BuildUnavailableError("no C++ compiler was found (install g++ or clang++, or name one with CXX)")


def find_ninja() -> str:
    """The path of ninja: the one installed beside this Python, else the one on PATH."""
    try:
        import ninja
    except ImportError:
        found = shutil.which("ninja")
    else:
        found = shutil.which("ninja", path=ninja.BIN_DIR) or shutil.which("ninja")
    if not found:
        raise BuildUnavailableError("ninja was not found (pip install ninja)")
    return found


def answer(*command: str) -> str:
    """What a command prints, "" when it cannot be run."""
    try:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout


def toolkit_folders() -> list[Path]:
    """Where a toolkit may be: CUDA_HOME alone if it is set, else where nvcc comes from, else the usual places.

    The nvcc on PATH may be a script that lies outside of its toolkit; nvcc itself knows where it is at home.
    """
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        return [Path(named)]
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        return list(TOOLKITS)
    told = re.search(r"\bTOP=(.+)", answer(nvcc, "--dryrun", "-c", "-x", "cu", os.devnull))
    return [*([Path(told[1].strip())] if told else []), Path(nvcc).resolve().parents[1], *TOOLKITS]


def find_toolkit() -> Toolkit:
    """The CUDA toolkit to compile with.  Raises CudaUnavailableError where there is none."""
    for folder in toolkit_folders():
        headers = [*folder.glob("include/cuda_runtime.h"), *folder.glob("targets/*/include/cuda_runtime.h")]
        nvcc = folder / "bin" / "nvcc"
        if headers and nvcc.is_file():
            release = re.search(r"\bV(\d[\d.]*)", answer(str(nvcc), "--version"))
            return Toolkit(
                folder.resolve(), release[1] if release else "unknown release", architectures(str(nvcc))
            )
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if named:
        raise CudaUnavailableError(f"CUDA_HOME names {named}, which lacks bin/nvcc or include/cuda_runtime.h")
    raise CudaUnavailableError("no CUDA toolkit was found (install one, or name it with CUDA_HOME)")


def architectures(nvcc: str) -> tuple[str, ...]:
    """The architectures of FASTFISHER_CUDA_ARCHS that this nvcc knows, ascending; the others are named and left out."""
    asked = {word.replace(".", "") for word in re.split(r"[;,\s]+", environment.CUDA_ARCHS.get()) if word}
    wrong = sorted(arch for arch in asked if not re.fullmatch(r"\d+[af]?", arch))
    if wrong:
        raise SystemExit(
            f"{environment.CUDA_ARCHS.name} must be numbers such as 80;90;100, got {', '.join(wrong)}"
        )
    known = set(re.findall(r"compute_(\d+)", answer(nvcc, "--list-gpu-arch")))
    taken = sorted((arch for arch in asked if arch.rstrip("af") in known), key=lambda a: int(a.rstrip("af")))
    dropped = sorted(asked.difference(taken))
    if dropped:
        print(f"{nvcc} does not know sm_{', sm_'.join(dropped)}: left out", file=sys.stderr)
    if not taken:
        raise CudaUnavailableError(f"{nvcc} knows none of the architectures {environment.CUDA_ARCHS.get()}")
    return tuple(taken)


def pybind11_include() -> str:
    try:
        import pybind11
    except ImportError:
        raise BuildUnavailableError("pybind11 was not found (pip install pybind11)") from None
    return str(pybind11.get_include())


def ninja_path(path: Path) -> str:
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def ninja_command(words: list[str]) -> str:
    return shlex.join(words).replace("$", "$$")


def compile_and_link(
    programs: dict[Path, dict[Path, list[str]]],
    *,
    folder: Path,
    flags: list[str],
    link: list[str],
    nvcc: list[str] | None = None,
) -> None:
    """Compile every source with `flags` and its own flags, all at once, and link each program from its sources.

    programs: output -> {source: its own flags}; a source of several programs is compiled once.  Objects, build.ninja
    and dependency files stay in `folder`, so that a second call compiles only what changed.
    nvcc: the command for .cu files, which gets none of `flags`; without it they are C++ like the others.
    Raises BuildUnavailableError with one sentence, CudaUnavailableError when it was nvcc that failed; the compiler's
    own words go to stderr.
    """
    compiler, ninja = find_compiler(), find_ninja()
    folder.mkdir(parents=True, exist_ok=True)
    lines = [
        "ninja_required_version = 1.5",
        "rule compile",
        f"  command = {ninja_command(compiler)} {ninja_command(flags)} $flags -MMD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "  description = compile $in",
        "rule cuda",
        f"  command = {ninja_command(nvcc or [])} $flags -MD -MF $out.d -c $in -o $out",
        "  deps = gcc",
        "  depfile = $out.d",
        "  description = compile $in",
        "rule link",
        f"  command = {ninja_command(compiler)} $in -o $out {ninja_command(link)}",
        "  description = link $out",
    ]
    objects: dict[Path, str] = {}
    for output, sources in programs.items():
        output.parent.mkdir(parents=True, exist_ok=True)
        for source, own in sources.items():
            if source not in objects:
                objects[source] = ninja_path(folder / f"{source.name}.o")
                rule = "cuda" if nvcc and source.suffix == ".cu" else "compile"
                lines += [
                    f"build {objects[source]}: {rule} {ninja_path(source)}",
                    f"  flags = {ninja_command(own)}",
                ]
        lines.append(f"build {ninja_path(output)}: link {' '.join(objects[source] for source in sources)}")
    (folder / "build.ninja").write_text("\n".join([*lines, ""]), encoding="utf-8")

    done = subprocess.run(
        [ninja, "-C", str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    print(done.stdout, file=sys.stderr, end="")
    if done.returncode:
        errors = [line for line in done.stdout.splitlines() if "error" in line.lower()]
        first = errors[0].strip() if errors else f"ninja ended with status {done.returncode}"
        if nvcc and re.search(r"^FAILED: .*\.cu\.o", done.stdout, re.MULTILINE):
            raise CudaUnavailableError(f"{nvcc[0]} failed: {first}")
        raise BuildUnavailableError(f"the C++ compiler {compiler[0]} failed: {first}")


def build_native(output: Path, folder: Path, toolkit: Toolkit | None) -> None:
    """Build the extension at `output`, its CUDA part by `toolkit`.  Raises BuildUnavailableError."""
    if sysconfig.get_platform().startswith("win"):
        raise BuildUnavailableError(
            "the kernels are written for g++ and clang++, which Python on Windows does not use"
        )
    bindings = ROOT / "csrc" / "bindings.cpp"
    if not bindings.is_file():
        raise BuildUnavailableError("the sources have no csrc/bindings.cpp")
    include = [pybind11_include(), sysconfig.get_path("include"), sysconfig.get_path("platinclude")]
    flags = [
        *COMMON,
        f"-I{ROOT / 'csrc'}",
        *(word for path in dict.fromkeys(include) for word in ("-isystem", path)),
    ]
    link = ["-bundle", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    sources = {bindings: [], **kernel_sources()}
    nvcc = None
    if toolkit:
        print(f"CUDA kernels: {toolkit} for sm_{', sm_'.join(toolkit.archs)}", file=sys.stderr)
        nvcc = toolkit.nvcc(find_compiler()[0])
        link += toolkit.link()
        sources = {bindings: ["-DFF_CUDA"], **kernel_sources(), **cuda_sources()}
    compile_and_link({output: sources}, folder=folder, flags=flags, link=[*link, "-pthread"], nvcc=nvcc)


def build_mode() -> str:
    mode = environment.BUILD.get()
    if mode not in ("none", "auto", "native", "cuda"):
        raise SystemExit(f"{environment.BUILD.name} must be none, auto, native or cuda, got {mode!r}")
    return mode


def record(package: Path, reason: str, cuda_reason: str, toolkit: Toolkit | None = None) -> None:
    """Write _build_info.py into `package`; with a reason, an extension left by an older build goes."""
    package.mkdir(parents=True, exist_ok=True)
    if reason:
        for stale in [*package.glob("_native*.so"), *package.glob("_native*.pyd")]:
            stale.unlink()
    lines = [
        '"""Written by setup.py: what this build consists of.',
        "",
        'REASON says why it has no native extension, CUDA_REASON why it has no CUDA kernels; "" where it has them."""',
        "",
        f"REASON = {reason!r}",
        f"CUDA_REASON = {cuda_reason!r}",
        f"CUDA_ARCHS = {toolkit.archs if toolkit else ()!r}",
        f"CUDA_TOOLKIT = {str(toolkit) if toolkit else ''!r}",
        "",
    ]
    (package / "_build_info.py").write_text("\n".join(lines), encoding="utf-8")


class BuildNative(build_ext):
    """build_ext by ninja; what stops it, and what it goes on without, is FASTFISHER_BUILD's to say."""

    extensions: list[Extension]

    def run(self) -> None:
        (extension,) = self.extensions
        package = ROOT / "fastfisher" if self.inplace else Path(self.build_lib).resolve() / "fastfisher"
        output = package / Path(self.get_ext_filename(extension.name)).name
        folder, mode = Path(self.build_temp).resolve(), build_mode()
        reason = cuda_reason = ""
        toolkit = None
        try:
            try:
                toolkit = find_toolkit()
            except CudaUnavailableError as error:
                if mode == "cuda":
                    raise
                cuda_reason = str(error)
            try:
                build_native(output, folder, toolkit)
            except CudaUnavailableError as error:
                if mode != "auto":
                    raise
                toolkit, cuda_reason = None, str(error)
                build_native(output, folder, None)
        except BuildUnavailableError as error:
            if mode != "auto":
                raise CompileError(f"{environment.BUILD.name}={mode}, but {error}") from None
            reason = cuda_reason = str(error)
            toolkit = None
            self.extensions = []
            print(f"fastfisher is installed without its native kernels: {reason}", file=sys.stderr)
        if cuda_reason and not reason:
            print(f"fastfisher is installed without its CUDA kernels: {cuda_reason}", file=sys.stderr)
        record(package, reason, cuda_reason, toolkit)


class BuildWithoutNative(build_py):
    """build_py that notes why there is no extension."""

    def run(self) -> None:
        super().run()
        package = ROOT / "fastfisher" if self.editable_mode else Path(self.build_lib).resolve() / "fastfisher"
        reason = f"it was switched off when fastfisher was built ({environment.BUILD.name}=none)"
        record(package, reason, reason)


if __name__ == "__main__":
    if build_mode() == "none":
        setup(cmdclass={"build_py": BuildWithoutNative})
    else:
        setup(cmdclass={"build_ext": BuildNative}, ext_modules=[Extension("fastfisher._native", [])])
