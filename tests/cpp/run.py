"""Build the C++ tests and the fuzz target with address and undefined-behaviour sanitizers, and run both.

python tests/cpp/run.py [seconds of fuzzing, 20 unless given] [first seed]
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import setup  # noqa: E402  (the build of the extension, from the folder above)

SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = [
    "-O1",
    "-g",
    "-std=c++17",
    "-ffp-contract=fast",
    "-pthread",
    "-Wall",
    "-Wextra",
    "-fno-omit-frame-pointer",
]


def main(arguments: list[str]) -> int:
    folder = ROOT / "build" / "sanitize"
    kernels = setup.kernel_sources()
    programs = {
        folder / name: {**kernels, ROOT / "tests" / "cpp" / f"{name}.cpp": []}
        for name in ("test_kernels", "fuzz_kernels")
    }
    try:
        setup.compile_and_link(
            programs,
            folder=folder,
            flags=[*FLAGS, *SANITIZE, f"-I{ROOT / 'csrc'}"],
            link=[*SANITIZE, "-pthread"],
        )
    except setup.BuildUnavailableError as error:
        print(error, file=sys.stderr)
        return 1
    for command in ([str(folder / "test_kernels")], [str(folder / "fuzz_kernels"), *(arguments or ["20"])]):
        if subprocess.run(command).returncode:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
