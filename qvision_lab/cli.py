"""The `qvision` command. Everything heavy is imported by the command that needs it."""

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import qvision_lab as ql

SUITES = ("parameters", "latency", "peers", "loading", "folder", "maps", "training", "recovery")
SUITES += ("baselines", "confidence", "costs")  # modules of benchmark/
SUITES_OF_DATA = {"maps", "baselines"}  # they take other images than Scenes
MODEL = "--model", "--revision", "--dtype", "--device"
SHARED = {  # options of several commands
    "--model": {"help": "folder or Hub id (default: the embedded checkpoint)"},
    "--revision": {"help": "branch, tag or commit on the Hub"},
    "--dtype": {"help": "float32, bfloat16 or float16"},
    "--device": {"help": "cpu, cuda, mps (default: cuda where there is one)"},
    "--preset": {"help": "published, model_card, greedy or beam (default: the model's own)"},
    "--split": {"help": "of several in --data: val2017, or Karpathy's test"},
    "--batch-size": {"type": int, "metavar": "N", "help": "default: 16; on a GPU 256"},
    "--seed": {"type": int, "default": 0, "help": "of random choices (%(default)s)"},
    "--metric": {"default": "CIDEr", "help": "column of the table to report (%(default)s)"},
    "--figures": {"metavar": "DIR", "help": "folder of the figures to draw (default: none)"},
}

EXAMPLES = """examples:
  qvision caption photo.jpg
  qvision caption photos/ --output captions.jsonl     run it again to resume
  qvision caption photos/ --temperature 0.7 --num-captions 3 --json
  qvision eval --data scenes:test --n 500
  qvision demo
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; return 0, 1 where some images failed, 2 where the request is wrong."""
    options = _parser().parse_args(arguments)
    if hasattr(sys.stdout, "reconfigure"):  # a name may have characters that it cannot encode
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda text, *_: print(f"qvision: {text}", file=sys.stderr)
            return options.run(options) or 0
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError) as error:  # bad input; bugs keep their traceback
        print(f"qvision: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qvision: interrupted", file=sys.stderr)
        return 130


def caption(options: argparse.Namespace) -> int:
    """Caption pictures, to the screen or to a file, from which a later call resumes."""
    from qvision_lab.captioning.images import walk_pictures
    from qvision_lab.data.atomic import is_main_process, output_file

    if options.output:
        output_file(options.output)  # raises before the long load, as the next line
    for path in options.paths:
        if path.endswith("/") and "://" not in path and not os.path.isdir(path):
            hint = f"name a folder of yours, or draw some: `qvision scenes write {path}`"
            raise ValueError(f"there is no folder {path}; {hint}.")
    next(walk_pictures(options.paths, options.recursive))
    captioner = ql.load(options.model, options.revision, options.dtype, options.device)
    names = ["num_beams", "num_return_sequences", "temperature", "max_new_tokens", "preset", "seed"]
    chosen = _chosen(options, *names, "batch_size", "preprocessing", "recursive")
    with TemporaryDirectory() as temporary:
        output = options.output or Path(temporary) / "captions.jsonl"
        report = captioner.caption_folder(options.paths, output, **chosen)
        if not is_main_process():
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
        print(report)
    return 1 if report.failed else 0


def info(options: argparse.Namespace) -> None:
    """Print a checkpoint's parameters, files and provenance."""
    from qvision_lab.model.loading.checkpoint import load_checkpoint
    from qvision_lab.model.parameters import parameter_table

    checkpoint = load_checkpoint(options.checkpoint, options.revision, device="cpu")
    origin = checkpoint.provenance
    print(f"{origin.source}: {origin.layout} layout, revision {origin.revision or '-'}")
    for name, size in origin.files.items():
        print(f"  {name:<32}{size:>16,} bytes")
    print(f"\n{'parameters':<30}{'total':>14}   trained in the published run")
    table = parameter_table(checkpoint.model.config)

    def show(name: str, parts: list, note: str = "") -> None:
        total, trained = sum(part.total for part in parts), sum(part.trained for part in parts)
        print(f"  {name:<28}{total:>14,}{trained:>14,}   {note}".rstrip())

    for group in dict.fromkeys(part.group for part in table):
        parts = [part for part in table if part.group == group]
        show(group, parts)
        for part in parts if len(parts) > 1 else ():
            show(f"  {part.part}", [part], "" if part.used else "published, unused")
    show("all", table)
    if not all(part.used for part in table):
        show("needed to caption", [part for part in table if part.used])


def evaluate(options: argparse.Namespace) -> None:
    """Score captions of a data set, captioning it first where none are given; resumes."""
    from qvision_lab.data.atomic import is_main_process, locked
    from qvision_lab.evaluation.java import find_java

    chosen = _chosen(options, "split", "n", "seed", "images", "instances")
    dataset = ql.coco.open_dataset(options.data, **chosen)
    output = Path(options.output)
    if options.baseline and Path(options.baseline).resolve() == output.resolve():
        raise ValueError(f"--baseline {output} would be overwritten: choose another --output.")
    output.mkdir(parents=True, exist_ok=True)
    if not options.metrics or {*options.metrics} - {"chair", "scenes"}:
        find_java()  # raises before the captions are made
    with locked(output):
        how = _chosen(options, "confidence", "resamples")
        if options.predictions:
            captions = ql.evaluation.read_results(options.predictions)
        else:
            if missing := dataset.missing():
                count = f"{len(missing):,} of {len(dataset):,} pictures"
                raise ValueError(f"{count} are not on disk ({missing[:5]}, ...); set --images.")
            captioner = ql.load(options.model, options.revision, options.dtype, options.device)
            chosen = _chosen(options, "preset", "batch_size")
            report = captioner.caption_dataset(dataset, output / "captions.jsonl", **chosen)
            if not is_main_process():
                return
            captions = ql.evaluation.read_captions(report.output, dataset)
            ql.evaluation.write_results(captions, output / "results.json")
            how["model"] = report.weights
        report = ql.evaluation.evaluate_dataset(captions, dataset, options.metrics, **how)
        print(f"{dataset.name}: {report}")
        if dataset.judge is None:  # photos
            print(ql.coco.contamination(dataset, options.train_captions))
        if options.baseline:
            print(ql.compare(report, ql.EvaluationReport.load(options.baseline)))
        print(f"-> {report.save(output)}")


def diagnose(options: argparse.Namespace) -> None:
    """Measure whether the queries of a model have collapsed."""
    dataset = ql.coco.open_dataset(options.data, **_chosen(options, "split", "n", "seed"))
    captioner = ql.load(options.model, options.revision, options.dtype, options.device)
    print(ql.diagnose(captioner, dataset))


def convert(options: argparse.Namespace) -> None:
    """Write a checkpoint in the layout that transformers reads too."""
    chosen = options.dtype, options.push_to, options.revision
    print(f"wrote {ql.convert(options.source, options.dest, *chosen)}")


def demo(options: argparse.Namespace) -> None:
    """Caption held-out scenes, check every caption against the truth; caption photographs."""
    ql.figures.run_demo(options.n, options.output, options.seed, options.model)
    if options.model is None:
        ql.figures.draw_photographs(Path(options.output).with_name("photos.png"))


def curves(options: argparse.Namespace) -> None:
    """Draw the training curves of the embedded checkpoint."""
    ql.figures.draw_curves(options.output)


def look(options: argparse.Namespace) -> None:
    """Draw the model's attention: word maps, queries, and the effect of removing patches."""
    ql.figures.draw_inside(options.output, options.n, options.seed, options.model, options.picture)


def explore(options: argparse.Namespace) -> int:
    """Open the explorer in JupyterLab: click words, mute parts of the model."""
    from qvision_lab.widgets.notebook import open_lab

    return open_lab(options.pictures, options.output, options.model)


def scenes_write(options: argparse.Namespace) -> None:
    """Write scenes as images with COCO's annotation files."""
    chosen = _chosen(options, "split", "seed", "workers")
    folder = ql.scenes.write_coco(options.folder, options.n, **chosen)
    print(f"{options.n} {options.split} scenes in {folder}")


def scenes_stats(options: argparse.Namespace) -> None:
    """Print statistics of a split."""
    for name, value in ql.scenes.describe(options.split, options.n, options.seed).items():
        if isinstance(value, dict):
            print(f"{name}:")
            for part, share in value.items():
                print(f"  {part:<36}{share:>8.1%}")
        else:
            print(f"{name:<38}{value:>8.3g}")


def train(options: argparse.Namespace) -> None:
    """Run a training recipe; run again, it resumes."""
    if options.processes > 1:  # the same command in each process, joined by torch's own launcher
        from torch.distributed.run import main as launch

        command = ["-m", "qvision_lab.cli", "train", options.recipe, "--output", options.output]
        command += ["--data", options.data] if options.data else []
        command += ["--set", *options.set] if options.set else []
        launch([f"--nproc-per-node={options.processes}", *command])
        return
    recipe = ql.training.load_recipe(options.recipe, options.set, options.data)
    print(f"wrote {ql.training.train_captioner(recipe, options.output)}")


def ablate(options: argparse.Namespace) -> None:
    """Run a study of variants and print what its intervals support; run again, it resumes."""
    study = ql.ablation.Study.read(options.study)
    output = options.output or f"runs/{study.name}"
    study.run(output, processes=options.processes)
    ql.figures.draw_findings(output, options.metric, options.figures)


def findings(options: argparse.Namespace) -> None:
    """Print and draw the findings of a finished study."""
    results = options.results or ql.figures.STUDY
    ql.figures.draw_findings(results, options.metric, options.figures)


def bench(options: argparse.Namespace) -> None:
    """Measure parameters, time and memory, interleaved with what they are compared with."""
    from qvision_lab.benchmark.harness import OutOfTime, time_limit

    if unknown := set(options.suites) - set(SUITES):
        raise ValueError(f"no benchmarks {unknown}; choose among {', '.join(SUITES)}.")
    if options.data and set(options.suites or SUITES) - SUITES_OF_DATA:
        raise ValueError(f"--data is for {' and '.join(sorted(SUITES_OF_DATA))}: name them alone.")
    captioner = ql.load(options.model, options.revision, options.dtype, options.device)
    for suite in options.suites or SUITES:
        benchmarks = import_module(f"qvision_lab.benchmark.{suite}").run_benchmarks
        try:
            with time_limit(options.limit):
                for result in benchmarks(captioner, options.quick, **_chosen(options, "data")):
                    print(f"{result}\n  -> {result.save(options.output)}", flush=True)
        except OutOfTime:
            print(f"{suite}: {options.limit:g} s are over; what it measured is saved", flush=True)


def tables(options: argparse.Namespace) -> None:
    """Draw the tables of pages, and figures of speed and recovery, from benchmark results."""
    from qvision_lab.benchmark import tables

    for page in options.pages or [tables.PAGE]:
        print(f"wrote {tables.fill(Path(page), more=ql.figures.STUDY_TABLES)}")
    for name, draw in tables.FIGURES.items() if options.figures else ():
        figure = Path(options.figures, f"{name}.png")
        ql.figures.write_styled(draw, figure)
        print(f"wrote {figure}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="qvision",
        description="Caption pictures with QVision, and train, measure and convert it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=version("qvision-lab"))
    parser.set_defaults(run=lambda _: parser.print_help())
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")

    add = _command(commands, "caption", caption, *MODEL, "--preset", "--batch-size", "--seed")
    add("paths", nargs="+", metavar="PATH", help="pictures, folders of pictures, or URLs")
    add("--output", metavar="FILE", help="JSON Lines file to write, or to resume")
    add("--preprocessing", default="training", help="training, model_card or clip (%(default)s)")
    add("--num-beams", type=int, metavar="N", help="beam search with N beams")
    add("--num-captions", dest="num_return_sequences", type=int, metavar="K", help="per picture")
    add("--temperature", type=float, metavar="T", help="sample; above 1 wilder, below 1 tamer")
    add("--max-new-tokens", type=int, metavar="N", help="longest caption")
    add("--recursive", action="store_true", help="include subfolders")
    add("--json", action="store_true", help="print records as JSON lines")

    how = "--preset", "--batch-size", "--seed", "--split"
    add = _command(commands, "eval", evaluate, *MODEL, *how)
    data = "COCO's, Karpathy's or a plain folder or file of captions, or scenes:test"
    add("--data", required=True, help=data)
    add("--n", type=int, metavar="N", help="score so many images, drawn with --seed")
    add("--images", metavar="DIR", help="folder of the pictures (default: around the captions)")
    add("--instances", metavar="FILE", help="COCO's instances (default: next to the captions)")
    add("--predictions", metavar="FILE", help="results.json to score (default: caption first)")
    add("--output", default="evaluation", metavar="DIR", help="of all results (%(default)s)")
    add("--metrics", nargs="+", help="bleu meteor rouge cider spice chair scenes (default: all)")
    add("--confidence", type=float, default=0.95, help="of the intervals (%(default)s)")
    add("--resamples", type=int, default=1000, metavar="N", help="of the bootstrap (%(default)s)")
    add("--baseline", metavar="DIR", help="results of an earlier call to compare with")
    add("--train-captions", metavar="FILE", help="captions_train2017.json: checks contamination")

    add = _command(commands, "diagnose", diagnose, *MODEL, "--seed", "--split")
    add("--data", default="scenes:val", help="images with captions, as for eval (%(default)s)")
    add("--n", type=int, default=64, metavar="N", help="images, drawn with --seed (%(default)s)")

    add = _command(commands, "info", info, "--revision")
    add("checkpoint", nargs="?", help="folder or Hub id (default: the embedded checkpoint)")

    add = _command(commands, "convert", convert, "--dtype", "--revision")
    add("source", help="folder or Hub id")
    add("dest", help="folder to write")
    add("--push-to", metavar="REPO", help="Hub id to upload the result to")

    number = {"type": int, "help": "number of scenes (%(default)s)"}
    add = _command(commands, "demo", demo, "--seed", "--model")
    add("--n", default=24, **number)
    add("--output", default="figures/demo.png", metavar="FILE", help="contact sheet (%(default)s)")

    add = _command(commands, "curves", curves)
    add("--output", default="figures/training.png", metavar="FILE", help="picture (%(default)s)")

    add = _command(commands, "look", look, "--seed", "--model")
    add("--n", default=16, **number)
    add("picture", nargs="?", metavar="PHOTO", help="your picture (default: scenes)")
    add("--output", default="figures", metavar="DIR", help="of the figures (%(default)s)")

    add = _command(commands, "explore", explore, "--model")
    add("pictures", nargs="*", metavar="PICTURE", help="files, folders or URLs, besides scenes")
    add("--output", default="explore.ipynb", metavar="FILE", help="notebook (%(default)s)")

    scenes = commands.add_parser("scenes", help="write or describe the drawn scenes")
    kinds = scenes.add_subparsers(required=True, metavar="write|stats")
    for name, run, n in (("write", scenes_write, 100), ("stats", scenes_stats, 2000)):
        add = _command(kinds, name, run, "--seed")
        add("--n", default=n, **number)
        if name == "write":
            add("folder", help="folder to write, or to extend")
            add("--workers", type=int, default=0, help="drawing processes (%(default)s: this one)")
        add("--split", default="test", help="train, val, test, compose or crowd (%(default)s)")

    add = _command(commands, "train", train)
    add("recipe", help=f"a YAML file, or {_names('training/recipes')}")
    add("--output", required=True, metavar="DIR", help="folder of the run and its checkpoint")
    add("--processes", type=int, default=1, metavar="N", help="share every batch among N processes")
    add("--data", metavar="DIR", help="folder or file of captions to train on and be scored on")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="change values of the recipe")

    add = _command(commands, "ablate", ablate, "--metric", "--figures")
    add("study", help=f"a YAML file, or {_names('ablation/studies')}")
    add("--output", metavar="DIR", help="folder of its runs and table (default: runs/NAME)")
    add("--processes", type=int, metavar="N", help="parallel runs (default: one for every core)")

    add = _command(commands, "findings", findings, "--metric", "--figures")
    add("results", nargs="?", metavar="DIR", help="of a study (default: the study of lengths)")

    add = _command(commands, "bench", bench, *MODEL)
    add("suites", nargs="*", metavar="SUITE", help=f"{', '.join(SUITES)} (default: all)")
    add("--data", metavar="DIR", help="captioned images for baselines and maps (default: Scenes)")
    add("--quick", action="store_true", help="few rounds: shows that it runs, measures little")
    add("--limit", type=float, metavar="S", help="seconds that each suite may take (default: any)")
    add("--output", default="runs/bench", metavar="DIR", help="of the results (%(default)s)")

    add = _command(commands, "tables", tables, "--figures")
    add("pages", nargs="*", metavar="PAGE", help="Markdown files (default: benchmark/results/)")
    return parser


def _command(commands, name: str, run: Callable, *shared: str) -> Callable[..., argparse.Action]:
    """Add a command with its function's docstring as help; return its `add_argument`."""
    summary = run.__doc__[0].lower() + run.__doc__[1:].rstrip(".")
    command = commands.add_parser(name, help=summary, description=run.__doc__)
    command.set_defaults(run=run)
    for option in shared:
        command.add_argument(option, **SHARED[option])
    return command.add_argument


def _names(folder: str) -> str:
    return ", ".join(sorted(p.stem for p in Path(__file__).parent.joinpath(folder).glob("*.yaml")))


def _chosen(options: argparse.Namespace, *names: str) -> dict:
    """The options of these names that are not None."""
    return {name: value for name in names if (value := getattr(options, name)) is not None}


if __name__ == "__main__":
    sys.exit(main())
