"""Put a run's modules on the shelf: ``python -m modlib.experiments.shelve RECIPE --profile cpu --seed 0``.

Writes every module of the final network, with its card, to ``book/results/zoo/``; ``modlib.zoo.take`` fills
a network with them.
"""

from __future__ import annotations

from pathlib import Path

from modlib.experiments.kept import arguments, kept, told
from modlib.reuse import zoo
from modlib.reuse.zoo import Card


def shelve(
    recipe: str,
    profile: str = "smoke",
    seed: int = 0,
    *,
    root: str | Path | None = None,
    results: str | Path = "book/results",
    runs: str | Path = "runs",
) -> list[Card]:
    """Save the modules of a run that is on this machine in ``results/zoo``, and return their cards.

    Args:
        recipe, profile, seed, root, results, runs: as in ``run``.

    Raises:
        ValueError: the run or its record is not there, or its modules are on the shelf already.
    """
    run = kept(recipe, profile, seed, root, results, runs)
    return zoo.shelve(
        run.after(run.record["history"][-1]),
        Path(results) / "zoo",
        name=f"{recipe}-{run.target.stem}",
        input_shape=run.data.shape,
        recipe=recipe,
        profile=profile,
        seed=seed,
        data=run.data.name,
        commit=run.record["commit"],
        test_accuracy=run.record["final"]["test_accuracy"],
    )


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("recipe")
    options = parser.parse_args()
    for card in shelve(
        options.recipe,
        options.profile,
        options.seed,
        results=options.results,
        runs=options.runs,
    ):
        print(card)


if __name__ == "__main__":
    told(main)
