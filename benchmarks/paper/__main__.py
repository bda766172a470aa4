"""All published experiments one after the other, and the page of their results: `python -m benchmarks.paper`."""

from __future__ import annotations

import subprocess
import sys

# What is said after `python -m benchmarks.paper.`, in the order of the papers.
COMMANDS = (
    "hessian_fisher",
    "quadratic_model",
    "kfac_blocks",
    "mlpnet_mnist",
    "mlpnet_mnist --samples 2000 --sparsities 0.8 0.9 --name mlpnet_mnist_2000",
    "resnet20_cifar10",
    "resnet20_cifar10 --samples 40000 --grad-batch-size 40 --seeds 1 --name resnet20_cifar10_means",
    "layers mlpnet",
    "chunk_size",
    "layers resnet20",
    "woodtaylor mlpnet",
    "woodtaylor resnet20",
    "woodtaylor_ablation",
    "recomputed mlpnet",
    "recomputed mlpnet_ep2",
    "recomputed resnet20 --seeds 1",
    "methods mlpnet",
    "methods resnet20 --seeds 1",
    "gradual mlpnet",
    "gradual resnet20",
    "fishleg mlpnet",
    "fishleg lenet",
    "fishleg resnet20 --seeds 1",
    "fishleg_forms",
    "fishleg_preconditioner",
    "fishleg_damping",
    "fishleg_noise",
    "char_transformer",
    "page",
)


def main() -> None:
    """Each in a process of its own, so that none keeps the memory of another; stops at the first that fails."""
    for command in COMMANDS:
        print(f"\npython -m benchmarks.paper.{command}", flush=True)
        script, *arguments = command.split()
        subprocess.run([sys.executable, "-m", f"benchmarks.paper.{script}", *arguments], check=True)


if __name__ == "__main__":
    main()
