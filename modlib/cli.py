"""The ``modlib`` command."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

_DESCRIPTION = """\
Train deep networks with and without end-to-end backpropagation, and measure what each method needs.

Start here:
  modlib compare --data digits            three methods on one small network, in seconds, offline
  modlib audit LocalLearning              which locks, passes, labels and bytes a method needs
  modlib run cifar10-e2ebp --profile cpu --seed 0
                                          train by a recipe and write the record the book reads
  modlib data cifar10                     fetch and prepare a data set, or say how to do it by hand
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 for an error, 2 for a wrong call, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        options.command(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print(f"\nmodlib: interrupted. {options.hint}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, FloatingPointError, OSError) as error:
        print(f"modlib: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("modlib", description=_DESCRIPTION, formatter_class=layout)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, command: Any, summary: str, epilog: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=summary, description=summary, epilog=epilog, formatter_class=layout
        )
        sub.set_defaults(command=command, hint="Nothing was written.")
        return sub

    sub = add("compare", _compare, "Train one network by a method of each category.", _COMPARE)
    sub.add_argument(
        "--data", default="digits", help="an image data set (default: digits, embedded)"
    )
    sub.add_argument(
        "--epochs", type=_whole(1), default=12, help="epochs of every module (default: 12)"
    )
    sub.add_argument("--json", action="store_true", help='print {"rows": [...]} for machines')
    _common(sub)

    sub = add("run", _run, "Train by a recipe and write its record.", _RUN)
    sub.add_argument("recipe", metavar="RECIPE", help='a recipe\'s name, or "list" to see them')
    sub.add_argument("--profile", default="smoke", help="smoke, cpu or gpu (default: smoke)")
    sub.add_argument("--results", default="book/results", help="folder for the record")
    sub.add_argument("--runs", default="runs", help="folder for checkpoints")
    sub.add_argument("--resume", action="store_true", help="go on from the run's checkpoint")
    sub.add_argument(
        "--dry-run", action="store_true", help="say what the run would take, without its data"
    )
    sub.add_argument(
        "--threads", type=_whole(1), help="processor threads (default: PyTorch's choice)"
    )
    sub.add_argument(
        "--parallel", choices=["modules"], help="one module in each process that torchrun started"
    )
    sub.add_argument(
        "--replay",
        type=_whole(0),
        default=0,
        metavar="N",
        help="with --parallel: wait for no module below, use one of its last N batches again (default: 0, wait)",
    )
    _common(sub)

    sub = add("data", _data, "Prepare a data set, or say how to do it by hand.", _DATA)
    sub.add_argument(
        "name", metavar="NAME", help='a name, or a folder\'s path; "list" to see names'
    )
    sub.add_argument("--size", type=_whole(1), help="side in pixels of square images")
    sub.add_argument(
        "--classes", metavar="FILE", help="a text file that names the classes to use, one a line"
    )
    sub.add_argument(
        "--from",
        dest="tree",
        metavar="FOLDER",
        help="unpacked ImageNet photographs, with train and val in it, that NAME is taken from",
    )
    sub.add_argument(
        "--root", help="where data sets are kept (default: $MODLIB_DATA, else a cache)"
    )

    sub = add("audit", _audit, "Measure what a method needs, on a small network.", _AUDIT)
    sub.add_argument("method", nargs="?", metavar="METHOD", help="a method (default: all)")
    sub.add_argument("--modules", type=_whole(2), default=3, help="K (default: 3)")
    sub.add_argument("--json", action="store_true", help="print plain data for machines")
    return parser


def _common(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--seed", type=_whole(0), default=0, help="of weights, order, augmentation (default: 0)"
    )
    sub.add_argument(
        "--root", help="where data sets are kept (default: $MODLIB_DATA, else a cache)"
    )
    sub.add_argument("--device", default="auto", help="auto, cpu, cuda, mps (default: auto)")
    sub.add_argument("--quiet", action="store_true", help="no progress bars")


def _whole(least: int) -> Callable[[str], int]:
    """An option's type: a whole number that is large enough."""

    def parse(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value} is too small; give {least} or more")
        return value

    parse.__name__ = "whole number"  # as argparse calls it when the text is none
    return parse


# --- commands: imports inside, since --help needs none of them ------------------------------------

_COMPARE = """\
The same network, data, order and epochs for each method. The category is measured, not declared.
Example:  modlib compare --data digits --json
"""


def _compare(options: argparse.Namespace) -> None:
    from modlib.experiments import compare

    rows = compare(
        options.data,
        epochs=options.epochs,
        seed=options.seed,
        root=options.root,
        device=options.device,
        progress=not options.quiet and not options.json and sys.stderr.isatty(),
    )
    if options.json:
        print(json.dumps({"rows": rows}))
        return
    print(f"One network on {options.data}, {options.epochs} epochs, seed {options.seed}:\n")
    print(f"{'method':<16}{'category':<16}{'test accuracy':>14}{'time':>9}{'peak memory':>14}")
    for row in rows:
        print(
            f"{row['method']:<16}{row['category']:<16}{row['test_accuracy']:>13.1%}"
            f"{row['wall_s']:>7.1f} s{row['peak_saved_bytes'] / 2**20:>10.2f} MiB"
        )
    print(
        "\nPeak memory: what autograd holds in one training step, parameters and buffers excluded."
    )


_RUN = """\
The record is written to RESULTS/RECIPE/PROFILE-seedN.json when the run ends. Ctrl-C, or a kill,
leaves a checkpoint under RUNS/; the same command with --resume goes on from it and ends in the same
history. Examples:  modlib run list
           modlib run cifar10-e2ebp --profile cpu --seed 1 --resume
           modlib run imagenet-100-resnet18-e2ebp --profile gpu --dry-run
           torchrun --nproc-per-node 3 -m modlib run cifar10-dgl-k3 --parallel modules
"""


def _run(options: argparse.Namespace) -> None:
    from contextlib import nullcontext

    import torch

    from modlib.experiments import RECIPES, run
    from modlib.parallel import ModuleParallel

    if options.recipe == "list":
        for name, recipe in RECIPES.items():
            print(f"{name:<40} profiles: {', '.join(recipe.profiles)}")
        return
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.dry_run:
        from modlib.experiments.plan import plan

        print(plan(options.recipe, options.profile))
        return
    options.hint = "The last epoch's checkpoint is kept; go on with the same command and --resume."
    if options.replay and not options.parallel:
        raise ValueError(f"--replay {options.replay}: give it together with --parallel modules.")
    with ModuleParallel(replay=options.replay) if options.parallel else nullcontext() as parallel:
        record = run(
            options.recipe,
            options.profile,
            options.seed,
            root=options.root,
            results=options.results,
            runs=options.runs,
            device=options.device,
            resume=options.resume,
            progress=not options.quiet,
            parallel=parallel,
        )
    if not record:  # the first process has written it
        return
    print(
        f"{record['recipe']} ({record['category']}, {record['modules']} modules), seed {record['seed']}: "
        f"test accuracy {record['final']['test_accuracy']:.2%} after {record['wall_s']:.0f} s of training"
    )


_DATA = """\
Data sets are kept as memory-mapped arrays: ROOT/NAME/{train,test}_{images,labels}.npy,
classes.json. Examples:  modlib data list
           modlib data cifar10 --root ~/data
           modlib data ~/pictures --size 64      a tree of train/CLASS/*.jpg and val/CLASS/*.jpg
           modlib data ~/ILSVRC2012 --size 128 --classes mine.txt       some classes of a tree
           modlib data imagenet-100 --from ~/ILSVRC2012                 a known choice of classes
What is interrupted, or killed, leaves nothing that is used; the same command starts again.
"""


def _data(options: argparse.Namespace) -> None:
    from modlib import data

    if options.name == "list":
        for name in data.names():
            print(
                f"{name:<18}{data.explain(name, options.root).splitlines()[0].partition(': ')[2]}"
            )
        return
    wishes = {"classes": _classes(options.classes), "size": options.size}
    if options.tree is None:
        print(data.explain(options.name, options.root, size=options.size))
    try:
        folder = data.prepare(options.name, options.root, tree=options.tree, **wishes)
    except FileNotFoundError:
        if options.tree is None:  # explained above
            raise SystemExit(1) from None
        raise
    if options.tree is not None:
        print(f"{options.name}: prepared in {folder}")


def _classes(path: str | None) -> list[str] | None:
    """The classes that a text file names: the first word of each line."""
    if path is None:
        return None
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [line.split()[0] for line in lines if line.strip()]


_AUDIT = """\
Real steps on copies of a small network and embedded data; nothing is declared by hand.
Example:  modlib audit ProxyObjective --json
"""


def _audit(options: argparse.Namespace) -> None:
    from modlib.experiments.audits import audits

    found = audits(options.method, options.modules)
    if options.json:
        print(json.dumps({"audits": [{"method": a.method, **a.summary()} for a in found]}))
        return
    print("\n\n".join(str(a) for a in found))
