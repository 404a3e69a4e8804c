"""The `qvision` command. Everything heavy is imported by the command that needs it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from qvision_lab.benchmark.parameters import PartSize

SUITES = (  # modules of benchmark/
    *("parameters", "latency", "peers", "loading", "folder", "maps", "training", "recovery"),
)
Run = Callable[[argparse.Namespace], int]
Add = Callable[..., argparse.Action]

EXAMPLES = """examples:
  qvision caption photo.jpg
  qvision caption photos/ --output captions.jsonl     run it again to go on where it stopped
  qvision caption photos/ --temperature 0.7 --num-captions 3 --json
  qvision eval --data scenes:test --n 500
  qvision demo
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 where some pictures failed, 2 where the request is wrong."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.run is None:
        parser.print_help()
        return 0
    try:
        return options.run(options)
    except BrokenPipeError:  # whoever reads, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError) as error:  # bad input; bugs keep their traceback
        print(f"qvision: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qvision: interrupted", file=sys.stderr)
        return 130


def caption(options: argparse.Namespace) -> int:
    """Caption pictures, to the screen or to a file that a later call goes on with."""
    from qvision_lab.captioning import load
    from qvision_lab.captioning.images import walk_pictures

    next(walk_pictures(options.paths, options.recursive))  # or nothing to do, before the long load
    captioner = load(options.model, options.revision, options.dtype, options.device)
    settings = ("preset", "num_beams", "num_return_sequences", "temperature", "max_new_tokens")
    chosen = {name: value for name in settings if (value := getattr(options, name)) is not None}
    with TemporaryDirectory() as temporary:
        report = captioner.caption_folder(
            options.paths,
            options.output or Path(temporary) / "captions.jsonl",
            recursive=options.recursive,
            batch_size=options.batch_size,
            preprocessing=options.preprocessing,
            seed=options.seed,
            **chosen,
        )
        if os.environ.get("RANK", "0") != "0":  # of several processes the first one tells
            return 0
        with open(report.output, encoding="utf-8") as lines:
            for line in lines:
                record = json.loads(line)
                if "error" in record:
                    print(f"qvision: {record['error']}", file=sys.stderr)
                elif not options.output and options.json:
                    print(line, end="")
                elif not options.output:
                    for text in record.get("captions", [record["caption"]]):
                        print(f"{record['source']}: {text}")
    if options.output:
        print(
            f"{report.captioned} captioned, {report.skipped} already there, {report.failed} failed"
            f" -> {report.output}"
        )
    return 1 if report.failed else 0


def info(options: argparse.Namespace) -> int:
    """Print a checkpoint's parameters, files and provenance."""
    from qvision_lab.benchmark.parameters import parameter_table
    from qvision_lab.model.loading.checkpoint import load_checkpoint

    checkpoint = load_checkpoint(options.checkpoint, options.revision, device="cpu")
    origin = checkpoint.provenance
    print(f"{origin.source}: {origin.layout} layout, revision {origin.revision or '-'}")
    for name, size in origin.files.items():
        print(f"  {name:<32}{size:>16,} bytes")
    print(f"\n{'parameters':<30}{'total':>14}   trained in the published run")
    table = parameter_table(checkpoint.model.config)
    for group in dict.fromkeys(row.group for row in table):
        parts = [row for row in table if row.group == group]
        _print_sizes(group, parts)
        for row in parts if len(parts) > 1 else ():
            _print_sizes(f"  {row.part}", [row], "" if row.used else "published, unused")
    _print_sizes("all", table)
    if not all(row.used for row in table):
        _print_sizes("needed to caption", [row for row in table if row.used])
    return 0


def _print_sizes(name: str, parts: Sequence[PartSize], note: str = "") -> None:
    total, trained = sum(part.total for part in parts), sum(part.trained for part in parts)
    print(f"  {name:<28}{total:>14,}{trained:>14,}   {note}".rstrip())


def evaluate(options: argparse.Namespace) -> int:
    """Score captions of a data set, or caption it first: run again, it goes on where it stopped."""
    from qvision_lab import evaluation
    from qvision_lab.data.coco import contamination, open_dataset

    chosen = {name: getattr(options, name) for name in ("split", "n", "seed", "images")}
    dataset = open_dataset(options.data, **chosen, instances=options.instances)
    output = Path(options.output)
    output.mkdir(parents=True, exist_ok=True)
    if options.predictions:
        captions = evaluation.read_results(options.predictions)
    else:
        from qvision_lab.captioning import load

        if missing := dataset.missing():
            raise ValueError(
                f"{len(missing):,} of {len(dataset):,} pictures are not on disk, the first being "
                f"{missing[:5]}; say with --images where they are."
            )
        captioner = load(options.model, options.revision, options.dtype, options.device)
        report = captioner.caption_dataset(
            dataset,
            output / "captions.jsonl",
            **({"preset": options.preset} if options.preset else {}),
            batch_size=options.batch_size,
        )
        captions = evaluation.read_captions(report.output, dataset)
        evaluation.write_results(captions, output / "results.json")
    how = {"confidence": options.confidence, "resamples": options.resamples}
    report = evaluation.evaluate_dataset(captions, dataset, options.metrics, **how)
    print(f"{dataset.name}: {report}")
    if not all(image.scene for image in dataset):
        print(contamination(dataset, options.train_captions))
    if options.baseline:
        print(evaluation.compare(report, evaluation.EvaluationReport.load(options.baseline)))
    print(f"-> {report.save(output)}")
    return 0


def convert(options: argparse.Namespace) -> int:
    """Write a checkpoint in the layout that transformers reads too."""
    from qvision_lab.model.loading.checkpoint import convert

    chosen = options.dtype, options.push_to, options.revision
    print(f"wrote {convert(options.source, options.dest, *chosen)}")
    return 0


def demo(options: argparse.Namespace) -> int:
    """Caption held-out scenes from disk and judge every caption against the truth."""
    from qvision_lab.demo import run_demo

    run_demo(options.n, options.output, options.folder, options.seed, options.model)
    return 0


def curves(options: argparse.Namespace) -> int:
    """Draw how the embedded checkpoint learned."""
    from qvision_lab.demo import draw_curves

    draw_curves(options.output)
    return 0


def look(options: argparse.Namespace) -> int:
    """Draw what the model looks at: word maps, queries, and what removing patches does."""
    from qvision_lab.demo import draw_inside

    draw_inside(options.folder, options.n, options.seed, options.model)
    return 0


def scenes_write(options: argparse.Namespace) -> int:
    """Write scenes as pictures with COCO's annotation files."""
    from qvision_lab.scenes import write_coco

    folder = write_coco(
        options.folder, options.n, split=options.split, seed=options.seed, workers=options.workers
    )
    print(f"{options.n} {options.split} scenes in {folder}")
    return 0


def scenes_stats(options: argparse.Namespace) -> int:
    """Print what a split is like."""
    from qvision_lab.scenes import describe

    for name, value in describe(options.split, options.n, options.seed).items():
        if isinstance(value, dict):
            print(f"{name}:")
            for part, share in value.items():
                print(f"  {part:<36}{share:>8.1%}")
        else:
            print(f"{name:<38}{value:>8.3g}")
    return 0


def train(options: argparse.Namespace) -> int:
    """Carry out a training recipe; run again, it goes on where it stopped."""
    if options.processes > 1:  # the same command in each process, joined by torch's own launcher
        from torch.distributed.run import main as launch

        command = ["-m", "qvision_lab.cli", "train", options.recipe, "--output", options.output]
        changes = ["--set", *options.set] if options.set else []
        launch([f"--nproc-per-node={options.processes}", *command, *changes])
        return 0
    from qvision_lab.training import run_recipe

    print(f"wrote {run_recipe(options.recipe, options.output, options.set)}")
    return 0


def ablate(options: argparse.Namespace) -> int:
    """Carry out a study of variants and say what its intervals support; run again, it goes on."""
    from qvision_lab.ablation import Study
    from qvision_lab.findings import tell

    study = Study.read(options.study)
    output = options.output or f"runs/{study.name}"
    study.run(output, processes=options.processes)
    tell(output, options.metric, options.figures)
    return 0


def findings(options: argparse.Namespace) -> int:
    """Say and draw what a finished study found."""
    from qvision_lab.findings import STUDY, tell

    tell(options.results or STUDY, options.metric, options.figures)
    return 0


def bench(options: argparse.Namespace) -> int:
    """Measure parameters, time and memory, in turn with what they are compared with."""
    from importlib import import_module

    from qvision_lab.benchmark.harness import OutOfTime, time_limit
    from qvision_lab.captioning import load

    if unknown := set(options.suites) - set(SUITES):
        raise ValueError(f"no benchmarks {unknown}; choose among {', '.join(SUITES)}.")
    captioner = load(options.model, options.revision, options.dtype, options.device)
    for suite in options.suites or SUITES:
        benchmarks = import_module(f"qvision_lab.benchmark.{suite}").run_benchmarks
        try:
            with time_limit(options.limit):
                for result in benchmarks(captioner, options.quick):
                    print(result, flush=True)
                    print(f"  -> {result.save(options.output)}", flush=True)
        except OutOfTime:
            print(f"{suite}: {options.limit:g} s are over; what it measured is saved", flush=True)
    return 0


def tables(options: argparse.Namespace) -> int:
    """Draw a page's tables, and how fast QVision is, from the results of the benchmarks."""
    from qvision_lab.benchmark import tables
    from qvision_lab.findings import as_table
    from qvision_lab.plots import write_figure

    of_study = {"study": lambda _: as_table()}
    print(f"wrote {tables.fill(Path(options.page), tables=tables.TABLES | of_study)}")
    for name, draw in tables.FIGURES.items() if options.figures else ():
        figure = Path(options.figures, f"{name}.png")
        write_figure(draw().figure, figure, dpi=150)
        print(f"wrote {figure}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qvision",
        description="Caption pictures with QVision, and train, measure and convert it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("qvision-lab"))
    parser.set_defaults(run=None)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    add = _command(commands, "caption", caption)
    add("paths", nargs="+", metavar="PATH", help="pictures, folders of pictures, or URLs")
    add("--output", metavar="FILE", help="JSON Lines file to write, or to go on with")
    _add_model(add)
    add("--preset", help="published, model_card, greedy or beam (default: the model's own)")
    add("--preprocessing", default="training", help="training, model_card or clip (%(default)s)")
    _add_batch_size(add)
    add("--num-beams", type=int, metavar="N", help="search with so many beams")
    captions = {"dest": "num_return_sequences", "type": int, "metavar": "K"}
    add("--num-captions", **captions, help="captions a picture (sampling or beams)")
    add("--temperature", type=float, metavar="T", help="sample; above 1 wilder, below 1 tamer")
    add("--max-new-tokens", type=int, metavar="N", help="longest caption")
    add("--seed", type=int, default=0, help="of what is sampled (%(default)s)")
    add("--recursive", action="store_true", help="look into subfolders too")
    add("--json", action="store_true", help="print records as JSON lines")

    add = _command(commands, "eval", evaluate)
    data = "COCO's, Karpathy's or a plain folder or file of captions, or scenes:test"
    add("--data", required=True, help=data)
    add("--split", help="of several in --data: val2017, or Karpathy's test")
    add("--n", type=int, metavar="N", help="score so many images, drawn with --seed")
    add("--seed", type=int, default=0, help="of the images (%(default)s)")
    add("--images", metavar="DIR", help="folder of the pictures (default: around the captions)")
    add("--instances", metavar="FILE", help="COCO's instances (default: beside the captions)")
    add("--predictions", metavar="FILE", help="results.json to score (default: caption first)")
    add("--output", default="evaluation", metavar="DIR", help="of all results (%(default)s)")
    add("--metrics", nargs="+", help="bleu meteor rouge cider spice chair scenes (default: all)")
    add("--confidence", type=float, default=0.95, help="of the intervals (%(default)s)")
    add("--resamples", type=int, default=1000, metavar="N", help="of the bootstrap (%(default)s)")
    add("--baseline", metavar="DIR", help="results of an earlier call to compare with")
    add("--train-captions", metavar="FILE", help="captions_train2017.json: looks for contamination")
    add("--preset", help="published, model_card, greedy or beam (default: the model's own)")
    _add_batch_size(add)
    _add_model(add)

    add = _command(commands, "info", info)
    add("checkpoint", nargs="?", help="folder or Hub id (default: the embedded checkpoint)")
    add("--revision", help="branch, tag or commit on the Hub")

    add = _command(commands, "convert", convert)
    add("source", help="folder or Hub id")
    add("dest", help="folder to write")
    add("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    add("--revision", help="branch, tag or commit on the Hub")
    add("--push-to", metavar="REPO", help="Hub id to upload the result to")

    add = _command(commands, "demo", demo)
    add("--n", type=int, default=24, help="number of scenes (%(default)s)")
    add("--output", default="figures/demo.png", metavar="FILE", help="contact sheet (%(default)s)")
    add("--folder", metavar="DIR", help="keep the picture files here (default: nowhere)")
    add("--seed", type=int, default=0, help="of the scenes (%(default)s)")
    add("--model", help="folder or Hub id (default: the embedded checkpoint)")

    add = _command(commands, "curves", curves)
    add("--output", default="figures/training.png", metavar="FILE", help="picture (%(default)s)")

    add = _command(commands, "look", look)
    add("--folder", default="figures", metavar="DIR", help="of the pictures (%(default)s)")
    add("--n", type=int, default=16, help="scenes that are looked into (%(default)s)")
    add("--seed", type=int, default=0, help="of the scenes (%(default)s)")
    add("--model", help="folder or Hub id (default: the embedded checkpoint)")

    scenes = commands.add_parser("scenes", help="the drawn world: write it, or describe it")
    kinds = scenes.add_subparsers(required=True, metavar="write|stats")
    for name, run, n in (("write", scenes_write, 100), ("stats", scenes_stats, 2000)):
        add = _command(kinds, name, run)
        if name == "write":
            add("folder", help="folder to write, or to extend")
            add("--workers", type=int, default=0, help="drawing processes (%(default)s: this one)")
        add("--split", default="test", help="train, val, test, compose or crowd (%(default)s)")
        add("--n", type=int, default=n, help="number of scenes (%(default)s)")
        add("--seed", type=int, default=0, help="of the scenes (%(default)s)")

    add = _command(commands, "train", train)
    add("recipe", help="name of a recipe, or a YAML file")
    add("--output", required=True, metavar="DIR", help="folder of the run and its checkpoint")
    add("--processes", type=int, default=1, metavar="N", help="share every batch among N processes")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change values of the recipe")

    add = _command(commands, "ablate", ablate)
    add("study", help="name of a study, or a YAML file")
    add("--output", metavar="DIR", help="folder of its runs and table (default: runs/NAME)")
    add("--processes", type=int, metavar="N", help="runs at once (default: one for every core)")
    _add_findings(add)

    add = _command(commands, "findings", findings)
    add("results", nargs="?", metavar="DIR", help="of a study (default: the package's own)")
    _add_findings(add)

    add = _command(commands, "bench", bench)
    add("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)} (default: all)")
    add("--quick", action="store_true", help="few rounds: shows that it runs, measures little")
    add("--limit", type=float, metavar="S", help="seconds that each suite may take (default: any)")
    add("--output", metavar="DIR", help="folder of the results (default: the package's, by device)")
    _add_model(add)

    add = _command(commands, "tables", tables)
    add("page", nargs="?", default="README.md", help="Markdown file (%(default)s)")
    add("--figures", metavar="DIR", help="folder for speed.png and recovery.png")
    return parser


def _command(commands: argparse._SubParsersAction, name: str, run: Run) -> Add:
    """Add a command that says what its function's docstring says; return its `add_argument`."""
    says = run.__doc__.rstrip(".")
    command = commands.add_parser(name, help=says[0].lower() + says[1:], description=run.__doc__)
    command.set_defaults(run=run)
    return command.add_argument


def _add_findings(add: Add) -> None:
    add("--metric", default="CIDEr", help="column of the table to speak of (%(default)s)")
    add("--figures", metavar="DIR", help="draw effects, trade-off and curves here")


def _add_batch_size(add: Add) -> None:
    add("--batch-size", type=int, metavar="N", help="pictures at once (default: 16; on a GPU 256)")


def _add_model(add: Add) -> None:
    add("--model", help="folder or Hub id (default: the embedded checkpoint)")
    add("--revision", help="branch, tag or commit on the Hub")
    add("--dtype", help="float32, bfloat16 or float16")
    add("--device", help="cpu, cuda, mps (default: cuda where there is one)")


if __name__ == "__main__":
    sys.exit(main())
