"""The forms of FishLeg's inverse, accuracy against memory: `python -m benchmarks.paper.fishleg_forms`.

MLPNET in ten stages to 95 % as in `fishleg`: the same images, gradients and schedule, all with the joint update of what
stays (the diagonal has none).  Writes fishleg_forms.csv, .png and .json.
Source: FishLeg Surgeon (McGowan et al., 2024).
"""

from __future__ import annotations

from typing import Any

from benchmarks.paper import experiment, stages
from benchmarks.paper.experiment import Claim, Curves

CLAIM = Claim(
    f"{stages.SURGEON}, parameterizations",
    "Kronecker factors keep the accuracy of blocks with a fraction of their memory (asked here: those in tiles of 256 "
    "are at most a point below blocks of 128 with at most 15 % of their state, and above the diagonal).",
)
# label -> the form
FORMS: dict[str, dict[str, Any]] = {
    "diagonal": {"parameterization": "diagonal"},
    "blocks of 32": {"parameterization": "block"},
    "blocks of 128": {"parameterization": "block"},
    "tiles of 64": {"parameterization": "block-kron", "tile": 64},
    "tiles of 256": {"parameterization": "block-kron", "tile": 256},
    "whole layers": {"parameterization": "kron"},
}


def bars(curves: Curves, final: float) -> list[dict[str, Any]]:
    tiles, blocks = "tiles of 256", "blocks of 128"
    share = 100 * curves.mean(tiles + stages.STATE, final) / curves.mean(blocks + stages.STATE, final)
    return [
        experiment.at_least(
            f"{final:.0%}: points of {tiles} above {blocks}",
            stages.lead(curves, tiles, blocks, final)[0],
            -1.0,
        ),
        experiment.at_least(
            f"{final:.0%}: points of {tiles} above the diagonal",
            stages.lead(curves, tiles, "diagonal", final)[0],
            0.0,
        ),
        experiment.at_most(f"{tiles}: state, % of that of {blocks}", share, 15.0),
    ]


def main(arguments: list[str] | None = None) -> None:
    network = stages.NETWORKS["mlpnet"]
    parser = experiment.parser(
        "fishleg_forms", __doc__.split("\n")[0], (), network.samples, seeds=3, damping=None
    )
    stages.add_arguments(parser)
    parser.set_defaults(num_grads=network.num_grads, network="mlpnet", final=network.final)
    options = experiment.read(parser, arguments)
    curves = experiment.start(options, stages.AXES)
    if not options.render:
        for seed in range(options.seeds):
            trained = stages.load(options, seed)
            curves.add("dense", 0.0, experiment.accuracy(trained.model, trained.test))
            for label, form in FORMS.items():
                size = {"block_size": int(label.split()[-1])} if "blocks" in label else {}
                told = {"method": "fishleg", "update": "joint", "fishleg": form, **size}
                stages.prune(options, curves, seed, trained, label, told)
    final = round(options.final, 4)
    experiment.report(
        options,
        curves,
        stages.picture(curves, list(FORMS), final),
        bars(curves, final),
        f"Forms of FishLeg's inverse: MLPNET in {options.stages} stages of "
        f"{experiment.count(options.num_grads, 'gradient')} ({experiment.count(options.seeds, 'seed')})",
        CLAIM,
        stages.AXES,
        keys=("samples", "num_grads", "stages", "train_steps", "seeds", "name"),
    )


if __name__ == "__main__":
    main()
