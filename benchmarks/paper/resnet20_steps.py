"""Why one step is not enough on ResNet-20: `python -m benchmarks.paper.resnet20_steps`.

The network of `resnet20_cifar10`, pruned to one sparsity by global WoodFisher in blocks of 100, in 1, 4 and 8 equal
steps of `ff.prune`.  Every step takes the same 1,000 images at the point the last one reached; no training in between.
If the estimate of the Fisher were at fault, more steps with the same estimator would not help; if it is the quadratic
model, trusted too far from the point where it was made, they do.
Writes resnet20_steps.csv and .json.
"""

from __future__ import annotations

import copy
import time

import fastfisher as ff
from benchmarks.paper import data, experiment
from benchmarks.paper.experiment import Curves
from benchmarks.paper.networks import ResNet20
from benchmarks.tables import markdown_table

STEPS = (1, 4, 8)
UPDATES = ("sum", "joint")
BLOCK_SIZE = 100


def main(arguments: list[str] | None = None) -> None:
    parser = experiment.parser("resnet20_steps", __doc__.split("\n")[0], (0.8,), 1_000, seeds=1)
    parser.add_argument("--block-size", type=int, default=BLOCK_SIZE, help="weights per Fisher block")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    data.add_argument(parser)
    options = parser.parse_args(arguments)
    options.defaults = {key: parser.get_default(key) for key in vars(options)}
    dense = data.load_weights(ResNet20(), options.data, "resnet20_cifar10_woodfisher.safetensors")
    curves = Curves()
    for seed in range(options.seeds):
        train, test = data.cifar10(options.data, options.samples, seed)
        loader = list(zip(train.images.split(100), train.labels.split(100), strict=True))
        curves.accuracy.setdefault(("dense", 0.0), []).append(experiment.accuracy(dense, test))
        for sparsity in options.sparsities:
            for update in UPDATES:
                for steps in options.steps:
                    started = time.perf_counter()
                    model = copy.deepcopy(dense)
                    for step in range(1, steps + 1):
                        ff.prune(
                            model,
                            loader,
                            sparsity=sparsity * step / steps,
                            block_size=options.block_size,
                            num_grads=options.samples,
                            damping=options.damping,
                            damping_mode="absolute",
                            update=update,
                            targets=ResNet20.prunable(),
                        )
                    label = f"{update}, {steps} steps"
                    curves.accuracy.setdefault((label, sparsity), []).append(experiment.accuracy(model, test))
                    curves.spent(label, started)
                    print(
                        f"seed {seed}, {sparsity:.0%}, {label}: {curves.mean(label, sparsity):.1f}",
                        flush=True,
                    )
    labels = [f"{update}, {steps} steps" for update in UPDATES for steps in options.steps]
    rows = [[label, *(f"{curves.mean(label, s):.1f}" for s in options.sparsities)] for label in labels]
    print(markdown_table(["update, steps", *(f"{s:.0%}" for s in options.sparsities)], rows))
    options.out.mkdir(parents=True, exist_ok=True)
    target = options.out / options.name
    experiment.write_csv(target.with_suffix(".csv"), curves)
    keys = ("samples", "damping", "seeds", "sparsities", "block_size", "steps", "name")
    experiment.write_record(target.with_suffix(".json"), curves, [], options, keys)


if __name__ == "__main__":
    main()
