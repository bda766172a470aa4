"""Compile `fastfisher._native` from csrc/, or say in one sentence why the package goes without it.

FASTFISHER_BUILD=auto    compile; where that is impossible, install the pure PyTorch package (the default)
FASTFISHER_BUILD=native  compile; fail where that is impossible
FASTFISHER_BUILD=none    do not compile

The outcome is written to fastfisher/_build_info.py, which `fastfisher doctor` repeats.  torch is not needed here: csrc
knows nothing of it.  Each instruction set is one source file with its own flags; the kernels choose among them when
they run, so one build serves every machine of an architecture.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
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


class BuildUnavailableError(Exception):
    """The extension cannot be built; the message is the sentence that `fastfisher doctor` repeats."""


def kernel_sources() -> dict[Path, list[str]]:
    """The files of csrc/cpu that this machine's architecture can compile, each with its flags."""
    machine = platform.machine().lower()
    sources = {}
    for path in sorted((ROOT / "csrc" / "cpu").glob("*.cpp")):
        machines, flags = ISA_FLAGS.get(path.stem, ((machine,), []))
        if machine in machines:
            sources[path] = flags
    return sources


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
    programs: dict[Path, dict[Path, list[str]]], *, folder: Path, flags: list[str], link: list[str]
) -> None:
    """Compile every source with `flags` and its own flags, all at once, and link each program from its sources.

    programs: output -> {source: its own flags}; a source of several programs is compiled once.  Objects, build.ninja
    and dependency files stay in `folder`, so that a second call compiles only what changed.
    Raises BuildUnavailableError with one sentence; the compiler's own words go to stderr.
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
        "rule link",
        f"  command = {ninja_command(compiler)} $in -o $out {ninja_command(link)}",
        "  description = link $out",
    ]
    objects: dict[Path, str] = {}
    for output, sources in programs.items():
        output.parent.mkdir(parents=True, exist_ok=True)
        for source, own in sources.items():
            if source not in objects:
                objects[source] = ninja_path(folder / f"{source.stem}.o")
                lines += [
                    f"build {objects[source]}: compile {ninja_path(source)}",
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
        raise BuildUnavailableError(f"the C++ compiler {compiler[0]} failed: {first}")


def build_native(output: Path, folder: Path) -> None:
    """Build the extension at `output`.  Raises BuildUnavailableError."""
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
    compile_and_link({output: sources}, folder=folder, flags=flags, link=[*link, "-pthread"])


def build_mode() -> str:
    mode = environment.BUILD.get()
    if mode not in ("none", "auto", "native"):
        raise SystemExit(f"{environment.BUILD.name} must be none, auto or native, got {mode!r}")
    return mode


def record(package: Path, reason: str) -> None:
    """Write _build_info.py into `package`; with a reason, an extension left by an older build goes."""
    package.mkdir(parents=True, exist_ok=True)
    if reason:
        for stale in [*package.glob("_native*.so"), *package.glob("_native*.pyd")]:
            stale.unlink()
    docstring = '"""Written by setup.py: why this build has no native extension, or "" where it has one."""'
    text = f"{docstring}\n\nREASON = {reason!r}\n"
    (package / "_build_info.py").write_text(text, encoding="utf-8")


class BuildNative(build_ext):
    """build_ext by ninja, which a missing compiler does not stop unless FASTFISHER_BUILD=native."""

    extensions: list[Extension]

    def run(self) -> None:
        (extension,) = self.extensions
        package = ROOT / "fastfisher" if self.inplace else Path(self.build_lib).resolve() / "fastfisher"
        output = package / Path(self.get_ext_filename(extension.name)).name
        reason = ""
        try:
            build_native(output, Path(self.build_temp).resolve())
        except BuildUnavailableError as error:
            if build_mode() == "native":
                raise CompileError(f"{environment.BUILD.name}=native, but {error}") from None
            reason = str(error)
            self.extensions = []
            print(f"fastfisher is installed without its native kernels: {reason}", file=sys.stderr)
        record(package, reason)


class BuildWithoutNative(build_py):
    """build_py that notes why there is no extension."""

    def run(self) -> None:
        super().run()
        package = ROOT / "fastfisher" if self.editable_mode else Path(self.build_lib).resolve() / "fastfisher"
        record(package, f"it was switched off when fastfisher was built ({environment.BUILD.name}=none)")


if __name__ == "__main__":
    if build_mode() == "none":
        setup(cmdclass={"build_py": BuildWithoutNative})
    else:
        setup(cmdclass={"build_ext": BuildNative}, ext_modules=[Extension("fastfisher._native", [])])
