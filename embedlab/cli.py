"""The command line. Rooms are imported inside functions only, so that --help is instant."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embedlab import __version__
from embedlab._durable import write_file
from embedlab._json import plain
from embedlab._machine import reuse_memory

if TYPE_CHECKING:
    from embedlab._types import Embeddings
    from embedlab.data import Source
    from embedlab.retrieval.evaluation import Evaluation, Plan
    from embedlab.retrieval.subjects import ReadingOptions, Subject

Result = dict[str, Any]
PATH_HELP = "folder of images (label = folder), CSV or Parquet manifest, one image, or torchvision:NAME"
VECTORS_HELP = f"{PATH_HELP}, stored embeddings, or vectors in a .npy, .parquet or .faiss file"
ENCODER_HELP = "folder of a saved encoder, or an exported ONNX file, which needs no torch"
ONE_PROBE_HELP = "all images are of one probe, such as the frames of one visit"
GALLERY_HELP = "folder of the gallery, or its address: milvus://HOST:PORT/NAME, milvus:FILE.db"
KEPT_ELSEWHERE_HELP = "encoder or ONNX file that the gallery was made with, where it keeps none (on Milvus)"
LABELS_HELP = "labels of the vectors: text with one per line, .npy, or .csv with the columns id,label"
SETTINGS = ("fusion", "vote_k", "search", "search_recall")  # of a gallery


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0, 1 for an error, 2 for a wrong call."""
    if arguments is None:  # a process of its own
        arguments = sys.argv[1:]
        if arguments[:1] != ["serve"]:  # which goes on for months
            reuse_memory()
    arguments = list(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    logging.getLogger("embedlab").setLevel(logging.INFO)
    try:
        if arguments[:1] == ["fit"] and arguments[1:] not in (["--help"], ["-h"]):
            from embedlab.fit import main as fit

            return fit(arguments[1:])
        options = _parser().parse_args(arguments)
        with contextlib.redirect_stdout(sys.stderr):  # bars and logs of libraries; stdout is for the result
            result = options.command(options)
        _print(result, options)
        return int(result.get("exit", 0)) if isinstance(result, dict) else 0
    except KeyboardInterrupt:
        sys.stderr.write("embedlab: interrupted\n")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if os.environ.get("EMBEDLAB_DEBUG"):
            raise
        kind = (
            "" if isinstance(error, ValueError | RuntimeError | OSError | ImportError) else f"{type(error).__name__}: "
        )
        sys.stderr.write(f"embedlab: error: {kind}{error}\n")
        return 1


def _print(result: Result, options: argparse.Namespace) -> None:
    text = result.pop("text", None)
    if result.get("silent"):
        return
    if options.json or text is None:
        result.pop("exit", None)
        print(json.dumps(plain(result), ensure_ascii=False, allow_nan=False))
    else:
        print(text)


# ---- the parser ----------------------------------------------------------------------------------------------------


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="embedlab",
        description="Train an embedding, build a gallery, name what you see and say unknown to strangers.",
    )
    parser.add_argument("--version", action="version", version=f"embedlab {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    _add_quickstart(commands)
    fit = commands.add_parser(
        "fit",
        help="train from a recipe",
        description="Train from a recipe: embedlab fit -c recipes/NAME.yaml [--run FOLDER] [--resume] [--KEY VALUE]."
        " Every key can be overridden, such as --trainer.max_epochs 5 or "
        "--data.init_args.root FOLDER; --print_config shows all keys with their values.",
    )
    fit.add_argument("-c", "--config", help="the recipe; several merge left to right")
    fit.add_argument("--run", help="run folder (default runs/<recipe>)")
    fit.add_argument("--resume", action="store_true", help="go on with the run in the run folder")
    fit.add_argument("--json", action="store_true", help="one JSON document on stdout")
    _add_embed(commands)
    _add_evaluate(commands)
    _add_oneshot(commands)
    _add_audit(commands)
    _add_finetune(commands)
    _add_export(commands)
    _add_gallery(commands)
    _add_serve(commands)
    _add_info(commands)
    return parser


def _command(commands: Any, name: str, run: Callable[[argparse.Namespace], Result], help: str) -> Any:
    parser = commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout; bars and logs go to stderr")
    parser.set_defaults(command=run)
    return parser


def _count(text: str) -> int:
    """A whole number from 1 on, as argparse's type."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"takes a whole number from 1 on, got {text!r}")
    return int(text)


def _place(text: str) -> str | Path:
    """Where a gallery lies, as argparse's type: an address stays as it is, or a path would lose a slash."""
    return text if text.startswith("milvus:") else Path(text)


def _add_reading(parser: Any) -> None:
    parser.add_argument(
        "--select",
        nargs="+",
        action="extend",
        metavar="COLUMN=VALUE",
        help="keep the rows of a manifest with these values; VALUE may be several, separated by commas, and one that "
        "holds a comma stands in double quotes: 'label=\"Rice, brown\",Oats'",
    )
    parser.add_argument("--on-error", choices=["stop", "skip"], default="stop", help="what an unreadable image does")


def _add_embedding(parser: Any) -> None:
    parser.add_argument("--batch-size", type=_count, default=128, help="images per forward pass")
    parser.add_argument(
        "--precision",
        choices=["float32", "bfloat16"],
        default="float32",
        help="bfloat16 is 2-3 times faster and moves a cosine by about 0.001",
    )


def _add_quickstart(commands: Any) -> None:
    parser = _command(commands, "quickstart", _quickstart, "the guided first run, about 3 minutes, no download")
    parser.add_argument("--out", type=Path, default=Path("embedlab-quickstart"), help="folder for what it makes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fpir", type=float, default=0.05, help="promised false-positive identification rate")
    parser.add_argument(
        "--effort", type=float, default=1.0, help="share of the training steps; below 1 for a look only"
    )


def _add_embed(commands: Any) -> None:
    parser = _command(commands, "embed", _embed, "embed images and store the vectors")
    parser.add_argument("path", help=PATH_HELP)
    parser.add_argument("--encoder", required=True, help=ENCODER_HELP)
    parser.add_argument("--out", type=Path, required=True, help="folder for the stored embeddings")
    parser.add_argument("--overwrite", action="store_true", help="replace stored embeddings")
    parser.add_argument("--resume", action="store_true", help="go on with a run that stopped")
    parser.add_argument(
        "--devices", type=_count, default=1, help="processes on this node, one per GPU or on the processor"
    )
    parser.add_argument("--nodes", type=_count, default=1, help="nodes that share the work and see the same folder")
    _add_reading(parser)
    _add_embedding(parser)


def _add_evaluate(commands: Any) -> None:
    parser = _command(
        commands, "evaluate", _evaluate, "measure retrieval, and with --open-set the refusal of strangers"
    )
    parser.add_argument("path", nargs="?", help=f"queries: {VECTORS_HELP}")
    parser.add_argument("--encoder", help=f"{ENCODER_HELP}; not needed for stored embeddings")
    parser.add_argument(
        "--compare",
        nargs=2,
        metavar=("A", "B"),
        help="two encoders side by side with paired intervals; without PATH, two sets of stored vectors of one set",
    )
    parser.add_argument("--reference", help="what to search (default: leave-one-out within the queries)")
    parser.add_argument(
        "--reference-select", nargs="+", action="extend", metavar="COLUMN=VALUE", help="as --select, for the reference"
    )
    parser.add_argument("--knn-k", type=_count, default=20, help="neighbours of the weighted k-NN classifier")
    parser.add_argument("--labels", help=LABELS_HELP)
    parser.add_argument("--baselines", action="store_true", help="also raw pixels and the untrained network")
    parser.add_argument("--no-verification", action="store_true", help="do not compare all pairs, whose number is N^2")
    parser.add_argument(
        "--coarse", metavar="COLUMN", help="coarser classes of a manifest: a near miss is better than a far one"
    )
    parser.add_argument(
        "--groups",
        nargs="+",
        action="extend",
        metavar="COLUMN",
        help="what is of the query's own group, such as its camera or track, does not count; several columns together "
        "name a group, and 'label' is one: label camera is the rule of person re-identification",
    )
    parser.add_argument("--out", type=Path, help="also write the JSON document to this file")
    parser.add_argument(
        "--report", type=Path, help="also write a report with pictures for the browser to this HTML file"
    )
    _add_reading(parser)
    _add_embedding(parser)
    group = parser.add_argument_group(
        "open-set trial",
        "Half of the queries' identities, by seed, are enrolled and the other half are strangers; the threshold is set "
        "on other identities.",
    )
    group.add_argument("--open-set", action="store_true", help="run the trial")
    group.add_argument("--calibrate", metavar="PATH", help="what sets the threshold (default: rows of PATH)")
    group.add_argument(
        "--calibrate-select", nargs="+", action="extend", metavar="COLUMN=VALUE", help="rows that set the threshold"
    )
    group.add_argument("--fpir", type=float, help="promised false-positive identification rate (default: 0.05)")
    group.add_argument("--templates", type=_count, help="enrolled images per identity, without --reference (3)")
    group.add_argument("--seed", type=int, default=0, help="of the halves and templates; the first of --seeds")
    group = parser.add_argument_group(
        "bad conditions",
        "All figures again with degraded queries; the reference, the templates and what sets the threshold stay clean.",
    )
    group.add_argument(
        "--degradations",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="all, or some of blur noise low_light haze jpeg downscale rain occlusion",
    )
    group.add_argument("--severities", type=_count, nargs="+", action="extend", help="from 1 to 5 (default: all)")
    group.add_argument("--pictures", type=Path, help="folder for robustness.png and degradations.png")
    group = parser.add_argument_group(
        "protocols for a pre-trained backbone",
        "Test accuracy on PATH of the backbone, without its head, with --reference as the labelled training images.",
    )
    group.add_argument(
        "--protocol",
        nargs="+",
        action="extend",
        choices=["knn", "linear", "low-shot"],
        help="knn is done with k = 200 and --knn-k",
    )
    group.add_argument("--seeds", type=_count, help="how many, for mean and standard deviation (default: 3)")
    group.add_argument(
        "--shares",
        type=float,
        nargs="+",
        action="extend",
        help="of the training labels, for low-shot fine-tuning (default: 0.01 0.1)",
    )
    group.add_argument("--steps", type=_count, help="of low-shot fine-tuning (default: 300)")
    group.add_argument("--flip", type=float, help="in fine-tuning, probability of a left-right flip (default: 0.5)")


def _add_oneshot(commands: Any) -> None:
    parser = _command(commands, "oneshot", _oneshot, "error of one-shot trials in the form of the Omniglot challenge")
    parser.add_argument("path", metavar="RUNS_DIR", type=Path, help="folder of runs, each with class_labels.txt")
    parser.add_argument("--encoder", required=True, help="folder of a saved encoder, or an ONNX file exported from one")
    _add_embedding(parser)
    group = parser.add_argument_group(
        "runs of one's own", "Drawn within alphabets: one drawer's characters to train, another's to test."
    )
    group.add_argument(
        "--draw",
        metavar="FOLDER",
        help="first write RUNS_DIR, a new folder, from FOLDER/ALPHABET/CHARACTER/NAME_DRAWER.png",
    )
    group.add_argument("--runs", type=_count, help="how many (default: 20)")
    group.add_argument("--ways", type=_count, help="characters of each (default: 20)")
    group.add_argument("--seed", type=int, help="of the draw (default: 0)")


def _add_audit(commands: Any) -> None:
    parser = _command(
        commands, "audit", _audit, "a threshold, wrong labels, duplicates and look-alikes of anyone's vectors"
    )
    parser.add_argument("path", metavar="VECTORS", help="stored embeddings, or a .npy, .parquet or .faiss file")
    parser.add_argument("labels", metavar="LABELS", nargs="?", help=f"{LABELS_HELP}; not needed if VECTORS has some")
    parser.add_argument("--fpir", type=float, default=0.01, help="promised false-positive identification rate")
    parser.add_argument("--duplicate", type=float, default=0.999, help="cosine from which rows are called duplicates")
    parser.add_argument("--out", type=Path, help="also write a report for the browser to this HTML file")


def _add_finetune(commands: Any) -> None:
    parser = _command(commands, "finetune", _finetune, "fine-tune a classifier on an encoder's backbone and test it")
    parser.add_argument("path", help=PATH_HELP)
    start = parser.add_mutually_exclusive_group(required=True)
    start.add_argument("--encoder", help="folder of a saved encoder to start from")
    start.add_argument("--scratch-like", metavar="ENCODER", help="the same network with random weights")
    parser.add_argument("--run", type=Path, required=True, help="run folder for report.json, predictions.csv, encoder/")
    parser.add_argument("--split", choices=["sample", "group", "column"], default="sample", help="how roles are drawn")
    parser.add_argument(
        "--fractions",
        type=float,
        nargs=3,
        metavar=("TRAIN", "CALIBRATE", "TEST"),
        help="shares of the images, or groups (default 0.7 0 0.3)",
    )
    parser.add_argument("--labels-per-class", type=_count, help="train on that many images of each class")
    parser.add_argument("--steps", type=_count, default=300)
    parser.add_argument("--batch-size", type=_count, default=64)
    parser.add_argument("--rate", type=float, default=1e-2, help="learning rate of the classifier")
    parser.add_argument("--backbone-rate", type=float, default=0.03, help="the backbone's, as a share of --rate")
    parser.add_argument("--loss", choices=["cross-entropy", "focal"], default="cross-entropy")
    parser.add_argument("--classifier", choices=["linear", "cosine"], default="cosine")
    parser.add_argument(
        "--positive", metavar="LABEL", help="of two classes, the one that precision, recall, AUC are about"
    )
    parser.add_argument("--beta", type=float, default=1.0, help="of F-beta: 2 weighs recall more than precision")
    parser.add_argument("--freeze", action="store_true", help="train the classifier only (linear probe)")
    parser.add_argument("--flip", type=float, default=0.5, help="probability of a left-right flip; 0 for text")
    parser.add_argument(
        "--quarter-turn",
        type=float,
        default=0.0,
        help="probability of a turn by 90, 180 or 270 degrees; 0.75 for surfaces and all that has no upper side",
    )
    parser.add_argument(
        "--crop",
        type=float,
        default=0.5,
        help="smallest share of the image that a crop keeps; near 1 for small defects",
    )
    parser.add_argument("--seed", type=int, default=0)
    _add_reading(parser)


def _add_serve(commands: Any) -> None:
    parser = _command(commands, "serve", _serve, "a gallery over HTTP, with a page for the browser")
    parser.add_argument("gallery", type=_place, help=GALLERY_HELP)
    parser.add_argument("--encoder", help=KEPT_ELSEWHERE_HELP)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; any but loopback needs --key-file")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--key-file", type=Path, help="file with the key that clients must send")
    parser.add_argument(
        "--allow-host",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="further names of this server, such as the one of a proxy",
    )
    parser.add_argument("--max-body", type=_bytes, default="10MB", help="largest request (default 10MB)")
    parser.add_argument("--read-only", action="store_true", help="change nothing; another process may write")
    parser.add_argument("--inbox", type=float, metavar="DAYS", help="keep unknown images for so many days")


def _bytes(text: str) -> int:
    """A number of bytes with or without kB, MB or GB, as argparse's type."""
    units = {"gb": 10**9, "mb": 10**6, "kb": 10**3, "b": 1, "": 1}
    number = text.strip().lower().rstrip("gmkb")
    unit = units.get(text.strip().lower()[len(number) :])
    if not number.isdecimal() or not int(number) or unit is None:
        raise argparse.ArgumentTypeError(f"takes a number of bytes such as 500kB or 10MB, got {text!r}")
    return int(number) * unit


def _add_info(commands: Any) -> None:
    parser = _command(commands, "info", _capacity, "parameters, multiply-adds, latency and memory of an encoder")
    parser.add_argument("encoder", help="folder of a saved encoder, or an exported .onnx file")
    parser.add_argument("--batches", type=_count, nargs="+", default=[1, 64], help="images per call")
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--device", help="such as cpu or cuda (default: a GPU where there is one)")
    parser.add_argument("--layers", action="store_true", help="also every layer")


def _add_export(commands: Any) -> None:
    parser = _command(
        commands, "export", _export, "write an encoder as one file, or a gallery as a folder without torch"
    )
    parser.add_argument("encoder", help="folder of a saved encoder, or of a gallery with one")
    parser.add_argument("--format", choices=["onnx", "torch-export"], default="onnx")
    parser.add_argument(
        "--out", type=Path, required=True, help="the file, such as encoder.onnx; a folder for a gallery"
    )
    parser.add_argument("--images", metavar="PATH", help=f"also compare both on these: {PATH_HELP}")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing file")
    _add_reading(parser)


def _add_gallery(commands: Any) -> None:
    gallery = commands.add_parser(
        "gallery", help="enroll, identify, verify, remove", description="Work with a gallery."
    )
    verbs = gallery.add_subparsers(title="verbs", required=True, metavar="VERB")

    def verb(
        name: str,
        run: Callable[[argparse.Namespace], Result],
        help: str,
        *,
        path: bool = False,
        several: bool = False,
        optional: bool = False,
    ) -> Any:
        parser = _command(verbs, name, run, help)
        parser.add_argument("gallery", type=_place, help=GALLERY_HELP)
        if path:
            parser.add_argument("--encoder", help=KEPT_ELSEWHERE_HELP)
            parser.add_argument("path", nargs="+" if several else "?" if optional else None, help=VECTORS_HELP)
            parser.add_argument("--labels", help=LABELS_HELP)
            _add_reading(parser)
        return parser

    create = verb("create", _create, "make an empty gallery")
    create.add_argument("--encoder", help="folder of a saved encoder, or an ONNX file; it is copied into the gallery")
    create.add_argument("--dim", type=int, help="numbers per vector, for a gallery of ready-made vectors")
    _add_settings(create)
    create.add_argument("--thumbnails", action="store_true", help="keep a small picture of every enrolled image")
    _add_configuring(verb("configure", _configure, "change how scores are made or neighbours are searched"))
    enroll = verb("enroll", _enroll, "add templates", path=True)
    enroll.add_argument("--label", help="one identity for all images; otherwise labels come from PATH")
    enroll.add_argument("--key", help="name of this request: repeating it adds nothing")
    remove = verb("remove", _remove, "remove identities or single templates")
    remove.add_argument("--label", nargs="+", action="extend", help="identities")
    remove.add_argument("--id", nargs="+", action="extend", type=int, help="templates")
    remove.add_argument("--purge", action="store_true", help="also erase the bytes from the files")
    rename = verb("rename", _rename, "give an identity another name")
    rename.add_argument("old")
    rename.add_argument("new")
    merge = verb("merge", _merge, "give all templates of one identity to another")
    merge.add_argument("source")
    merge.add_argument("into")
    verb("list", _list, "identities with their number of templates")
    search = verb("search", _search, "nearest templates", path=True)
    search.add_argument("-k", type=_count, default=10, help="neighbours of each probe (default: 10)")
    search.add_argument("--per", choices=["template", "identity"], default="template", help="what -k counts")
    identify = verb("identify", _identify, "name each image, or say unknown", path=True, several=True)
    identify.add_argument("-k", type=_count, default=5, help="neighbours that come with each answer")
    identify.add_argument("--one-probe", action="store_true", help=ONE_PROBE_HELP)
    identify.add_argument("--show", type=Path, metavar="FILE", help="also draw queries, answers and neighbours: a PNG")
    verify = verb("verify", _verify, "check that an image shows who it claims to", path=True)
    verify.add_argument("--label", required=True, help="the claimed identity")
    verify.add_argument("--one-probe", action="store_true", help=ONE_PROBE_HELP)
    _add_promising(verb("calibrate", _calibrate, "set the unknown threshold from strangers", path=True, optional=True))
    verb("check", _check, "verify every byte")
    verb("backup", _backup, "copy one consistent state").add_argument("out", type=Path)
    verb("compact", _compact, "give free space back")
    _add_migrating(
        verb("migrate", _migrate, "put another encoder under it; old and new are compared before the switch")
    )
    verb("info", _info, "what the gallery holds and promises")
    report = verb("report", _report, "one HTML file: promise, identities with pictures, look-alikes, wrong labels")
    report.add_argument("--out", type=Path, default=Path("report.html"), help="file to write (default: report.html)")


def _add_promising(parser: Any) -> None:
    parser.add_argument("--fpir", type=float, default=0.01, help="promised false-positive identification rate")
    parser.add_argument("--fmr", type=float, help="promised false match rate of verify (default: fpir)")
    parser.add_argument("--growth", type=float, default=1.0, help="promised for up to so many times the identities")
    parser.add_argument("--one-probe", action="store_true", help="all images of a label are one probe")
    parser.add_argument(
        "--leave-identity-out", action="store_true", help="without PATH: the enrolled play the strangers; a makeshift"
    )


def _add_migrating(parser: Any) -> None:
    parser.add_argument("--encoder", help=f"the new one: {ENCODER_HELP}; without it the gallery moves as it is")
    parser.add_argument("--to", metavar="PLACE", help="leave the old gallery as it is and make the new one there")
    parser.add_argument("--strangers", metavar="PATH", help=f"set the new threshold from these: {PATH_HELP}")
    parser.add_argument("--one-probe", action="store_true", help="all images of a stranger are one probe")
    parser.add_argument("--leave-identity-out", action="store_true", help="instead: the enrolled play the strangers")
    parser.add_argument("--fpir", type=float, help="promised false-positive identification rate (default: as before)")
    parser.add_argument("--fmr", type=float, help="promised false match rate of verify (default: as before)")
    parser.add_argument("--growth", type=float, help="promised for up to so many times the identities (as before)")
    parser.add_argument("--probes", metavar="PATH", help=f"also compare the answers to these: {PATH_HELP}")
    parser.add_argument("--cohort", metavar="PATH", help=f"of normalised scores, images of others: {PATH_HELP}")
    parser.add_argument("--drop-missing", action="store_true", help="leave out templates whose image cannot be read")
    parser.add_argument(
        "--no-switch", action="store_true", help="stop before the switch; without it goes on from there"
    )


def _add_settings(parser: Any) -> None:
    fusions, searches = ["max", "mean", "vote"], ["auto", "exact", "ivf", "hnsw"]
    parser.add_argument("--fusion", choices=fusions, help="over an identity's templates (a new gallery: max)")
    parser.add_argument("--vote-k", type=_count, help="templates that vote (a new gallery: 10)")
    parser.add_argument("--search", choices=searches, help="how neighbours are found (a new gallery: auto)")
    parser.add_argument("--search-recall", type=float, help="that an index must reach (a new gallery: 0.999)")


def _add_configuring(parser: Any) -> None:
    _add_settings(parser)
    parser.add_argument("--normalisation", choices=["as-norm", "none"], help="of scores; as-norm takes a cohort")
    parser.add_argument("--encoder", help=KEPT_ELSEWHERE_HELP)
    parser.add_argument("--cohort", metavar="PATH", help=f"others, not enrolled nor calibrated with: {VECTORS_HELP}")
    parser.add_argument("--cohort-k", type=_count, help="highest scores with the cohort that count")


# ---- what was given ------------------------------------------------------------------------------------------------


def _given(options: argparse.Namespace, *names: str) -> dict[str, Any]:
    """Those of the options that were given; the others keep the defaults of what they are passed to."""
    return {name: getattr(options, name) for name in names if getattr(options, name) is not None}


def _require(options: argparse.Namespace, switch: str, *names: str) -> None:
    """Refuse options that mean nothing without another one."""
    flag, *flags = (f"--{name.replace('_', '-')}" for name in (switch, *_given(options, *names)))
    if flags and not getattr(options, switch):
        belong = "belong" if len(flags) > 1 else "belongs"
        raise ValueError(
            f"{', '.join(flags)} {belong} to {flag}, which was not given; add it, or leave out {', '.join(flags)}."
        )


_READ = ("path", "reference", "calibrate", "labels", "encoder", "compare", "gallery")


def _spare_inputs(options: argparse.Namespace, *outputs: str) -> None:
    """Refuse to write over what is read, before any work is done."""
    given = [getattr(options, name, None) for name in _READ]
    flat = [part for value in given for part in (value if isinstance(value, list) else [value])]
    taken = [os.path.realpath(part) for part in flat if part is not None and os.path.exists(part)]
    for name in outputs:
        path = getattr(options, name)
        if path is None or _streams(path):
            continue
        flag, place = f"--{name}", os.path.realpath(path)
        if os.path.isdir(place):
            raise ValueError(f"{path} is a folder; {flag} takes the file to write, such as {path}/report.html.")
        if place in taken or (os.path.isfile(place) and not _is_document(place) and _lies_in(place, taken)):
            raise ValueError(
                f"{flag} {path} would overwrite what is read or written by the same command; name another file, or "
                "delete that one first if it is no longer needed."
            )
        taken.append(place)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"{flag} {path}: there is no folder {path.parent}, and none can be made ({error})."
            ) from error
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"{flag} {path}: nothing can be written in {path.parent}; choose another folder.")


def _lies_in(place: str, folders: Sequence[str]) -> bool:
    return any(os.path.isdir(folder) and os.path.commonpath([folder, place]) == folder for folder in folders)


def _is_document(place: str) -> bool:
    """Whether a file is a report or a result of ours, which may be made anew."""
    with open(place, "rb") as file:
        begin = file.read(64)
    return begin.startswith((b"<!doctype html>", b'{\n "results": '))


def _streams(path: Path) -> bool:
    """Whether it is a pipe, a terminal or the like, which takes text as it comes."""
    special = os.path.abspath(path).startswith(("/dev/", "/proc/"))
    return special or (path.exists() and not path.is_file() and not path.is_dir())


# ---- reading what PATH names ---------------------------------------------------------------------------------------


def _selection(pairs: list[str] | None) -> dict[str, list[str]] | None:
    if not pairs:
        return None
    selected: dict[str, list[str]] = {}
    for pair in pairs:
        column, equals, values = pair.partition("=")
        if not equals or not column or not values:
            raise ValueError(f"--select takes COLUMN=VALUE, got {pair!r}; such as --select split=test.")
        selected.setdefault(column, []).extend(_values(pair, values))
    return selected


def _values(pair: str, text: str) -> list[str]:
    """Separated by commas; one in double quotes may hold a comma."""
    if '"' not in text:
        return text.split(",")
    try:
        values = next(csv.reader([text], strict=True))
    except csv.Error as error:
        raise ValueError(
            f'--select {pair}: {error}; a quoted value is "A, B", with a comma behind it or the end.'
        ) from error
    if any('"' in value for value in values):
        raise ValueError(f"--select {pair}: a quote within a value; quote the whole of it, without a blank before.")
    return values


def _is_vectors(path: str) -> bool:
    from embedlab.retrieval.embeddings import is_vectors

    return is_vectors(path)


def _vectors(path: str, labels: str | None) -> Embeddings:
    from embedlab.retrieval import read_vectors

    return read_vectors(path, labels)


def _source(path: str, select: list[str] | None) -> Source:
    from embedlab.data import open_source

    return open_source(path, select=_selection(select))


def _probes(options: argparse.Namespace, gallery: Any) -> Embeddings:
    """Vectors with labels and paths, whatever PATH is; images go through the gallery's own encoder."""
    if _is_vectors(options.path):
        return _selected_vectors(options.path, options.labels, options.select)
    if options.labels:
        raise ValueError(
            f"--labels belongs to files of vectors, and {options.path} holds images: these are labelled by their "
            "folder or a manifest, or all alike by 'gallery enroll --label'."
        )
    source = _source(options.path, options.select)
    found: Embeddings = gallery.embed(source, on_error=options.on_error)
    return found


def _several_probes(options: argparse.Namespace, gallery: Any) -> Embeddings:
    """The same for several PATHs, one after another."""
    import numpy as np

    from embedlab._types import Embeddings

    parts = [_probes(argparse.Namespace(**vars(options) | {"path": path}), gallery) for path in options.path]
    if len(parts) == 1:
        return parts[0]
    vectors = np.concatenate([part.vectors for part in parts])
    names = [name for part in parts for name in _names(part)]
    labels = [label for part in parts for label in part.labels or []]
    return Embeddings(vectors, labels if len(labels) == len(vectors) else None, np.arange(len(vectors)), names)


def _as_one(found: Embeddings) -> Embeddings:
    """All images as one probe, under the name of the first."""
    from embedlab._types import Embeddings
    from embedlab.retrieval.inputs import normalised, pooled

    vectors = pooled(normalised(found.vectors, None), [0] * len(found))[0]
    labels = found.labels[:1] if found.labels and len(set(found.labels)) == 1 else None
    return Embeddings(vectors, labels, found.ids[:1], found.paths and found.paths[:1])


def _require_labels(labels: list[str] | None, path: str) -> list[str]:
    if labels is None:
        raise ValueError(
            f"{path} has no labels. Put the images into one folder per identity, use a manifest with the columns "
            "path and label, or name them all by --label."
        )
    return labels


# ---- commands ------------------------------------------------------------------------------------------------------


def _capacity(options: argparse.Namespace) -> Result:
    from embedlab.encoders import Encoder, measure_capacity
    from embedlab.retrieval.embedders import as_embedder

    whole = (Path(options.encoder) / "encoder.json").is_file()  # rather than its export beside it
    encoder: Any = Encoder.load(options.encoder) if whole else as_embedder(options.encoder)
    found = measure_capacity(
        encoder,
        batches=options.batches,
        precision=options.precision,
        device=options.device,
        layers=options.layers,
    )
    return found.to_dict() | {"text": found.to_text()}


def _quickstart(options: argparse.Namespace) -> Result:
    from embedlab.quickstart import run

    return run(options.out, seed=options.seed, fpir=options.fpir, effort=options.effort)


def _embed(options: argparse.Namespace) -> Result:
    from embedlab.retrieval.embedders import as_embedder
    from embedlab.retrieval.extraction import extract

    encoder: Any = as_embedder(options.encoder)
    protocol = {
        "encoder": encoder.fingerprint,
        "preprocessing": encoder.preprocessing,
        "precision": options.precision,
        "source": options.path,
        "select": _selection(options.select),
    }
    found = extract(
        encoder,
        _source(options.path, options.select),
        options.out,
        protocol=protocol,
        batch_size=options.batch_size,
        precision=options.precision,
        on_error=options.on_error,
        devices=options.devices,
        nodes=options.nodes,
        resume=options.resume,
        overwrite=options.overwrite,
    )
    if found is None:  # a further process of the same run
        return {"silent": True}
    kept = f" ({found.kept} were there)" if found.kept else ""
    text = f"{found.count} images{kept}, {found.dim} numbers each, in {found.seconds:.1f} s: {options.out}"
    return {"out": str(options.out), "encoder": encoder.fingerprint, **vars(found), "text": text}


def _evaluate(options: argparse.Namespace) -> Result:
    _require(options, "open_set", "calibrate", "calibrate_select", "fpir", "templates")
    _require(options, "degradations", "severities", "pictures")
    _require(options, "protocol", "seeds", "shares", "steps", "flip")
    if options.protocol:
        return _evaluate_backbone(options)
    from embedlab.retrieval import comparison, findings
    from embedlab.retrieval.evaluation import evaluate, protocol_of, to_text

    _spare_inputs(options, "out", "report")
    started = time.perf_counter()
    found = [evaluate(subject, _plan(options, path)) for subject, path in _subjects(options)]
    if options.degradations:
        found = _degraded(options, found)
    compared = comparison.compare(*found) if options.compare else None
    text = to_text(found) + (f"\n\n{comparison.to_text(compared)}" if compared else "")
    if options.degradations:
        text += f"\n\n{_degraded_text(options, found)}"
    result: Result = {
        "results": {one.name: one.figures for one in found},
        "details": {one.name: findings.to_dict(one) for one in found},
        **({"comparison": compared} if compared else {}),
        "protocol": protocol_of(found),
        "seconds": round(time.perf_counter() - started, 2),
    }
    costs: dict[str, Any] = {}
    if options.report:
        from embedlab.serving.evaluation import costs_of, evaluation_report

        costs = costs_of(found, precision=options.precision)
        result["capacity"] = {name: cost.to_dict() for name, cost in costs.items()}
    if options.out:
        _write(options.out, json.dumps(plain(result), indent=1))
    if options.report:
        document = evaluation_report(found, compared, result["protocol"], capacities=costs)
        result |= _write_report(options.report, document)
        text += f"\n\n{options.report}: open it in a browser"
    return {**result, "text": text}


def _plan(options: argparse.Namespace, path: str) -> Plan:
    from embedlab.retrieval.evaluation import Plan

    return Plan(
        path=path,
        select=_selection(options.select),
        reference=options.reference,
        reference_select=_selection(options.reference_select),
        open_set=options.open_set,
        calibrate=options.calibrate,
        calibrate_select=_selection(options.calibrate_select),
        knn_k=options.knn_k,
        seed=options.seed,
        verification=not options.no_verification,
        coarse=options.coarse,
        groups=options.groups or (),
        degradations=options.degradations or (),
        **_given(options, "fpir", "templates", "severities"),
    )


def _degraded(options: argparse.Namespace, found: list[Evaluation]) -> list[Evaluation]:
    """Measure again under bad conditions."""
    from embedlab.retrieval.robustness import with_degradations

    return [with_degradations(one, _reading_options(options)) for one in found]


def _degraded_text(options: argparse.Namespace, found: list[Evaluation]) -> str:
    """Tables of it, and the pictures where they are asked for."""
    from embedlab.retrieval.robustness import robustness_text

    text = robustness_text(found)
    if options.pictures:
        from embedlab.serving.pictures import draw_degradation_sheet, draw_robustness

        options.pictures.mkdir(parents=True, exist_ok=True)
        draw_robustness(options.pictures / "robustness.png", {one.name: one.figures["degraded"] for one in found})
        plan = found[0].plan
        draw_degradation_sheet(
            options.pictures / "degradations.png",
            _source(plan.path, options.select),
            found[0].subject.encoder,  # type: ignore[arg-type]
            names=plan.degradations,
            severities=plan.severities,
            seed=plan.seed,
        )
        text += f"\n\n{options.pictures}: robustness.png, degradations.png"
    return text


def _reading_options(options: argparse.Namespace) -> ReadingOptions:
    from embedlab.retrieval.subjects import ReadingOptions

    return ReadingOptions(batch_size=options.batch_size, precision=options.precision, on_error=options.on_error)


def _subjects(options: argparse.Namespace) -> list[tuple[Subject, str]]:
    from embedlab.retrieval.subjects import choose_subjects

    return choose_subjects(
        options.path,
        encoder=options.encoder,
        compare=options.compare,
        baselines=options.baselines,
        select=_selection(options.select),
        labels=options.labels,
        options=_reading_options(options),
        reference=options.reference,
    )


def _evaluate_backbone(options: argparse.Namespace) -> Result:
    if not options.path or not options.encoder or not (options.reference or options.reference_select):
        raise ValueError(
            "--protocol needs PATH, --encoder and --reference, the labelled training images (or --reference-select, "
            "their rows of the same manifest)."
        )
    others = ("open_set", "baselines", "compare", "report", "degradations", "coarse", "groups")
    if given := [f"--{name.replace('_', '-')}" for name in others if getattr(options, name)]:
        raise ValueError(f"--protocol measures one backbone; run {' and '.join(given)} without it.")
    from embedlab._machine import versions
    from embedlab.encoders import Encoder
    from embedlab.retrieval.embedders import on_device
    from embedlab.tasks import evaluate_backbone

    _spare_inputs(options, "out")
    result = evaluate_backbone(
        on_device(Encoder.load(options.encoder)),
        _source(options.reference or options.path, options.reference_select),
        _source(options.path, options.select),
        protocols=options.protocol,
        k=list(dict.fromkeys([200, options.knn_k])),
        seeds=range(options.seed, options.seed + (options.seeds or 3)),
        **_given(options, "shares", "steps", "flip"),
        batch_size=options.batch_size,
        precision=options.precision,
        on_error=options.on_error,
        progress=not options.json,
    )
    result["protocol"] |= {
        name: getattr(options, name) for name in ("path", "select", "reference", "reference_select")
    } | {"versions": versions("torch", "numpy", "scipy")}
    if options.out:
        _write(options.out, json.dumps(plain(result), indent=1))
    return {**result, "text": _protocol_table(result)}


def _protocol_table(result: Result) -> str:
    rows = [(f"k-NN k={row['k']} t={row['temperature']}", row) for row in result.get("knn", [])]
    rows += [("linear probe", result["linear"])] if "linear" in result else []
    rows += [(f"low-shot {row['share'] * 100:g} %", row) for row in result.get("low-shot", [])]
    spreads = ["" if row.get("sd") is None else f"  sd {row['sd']:.4f}" for _, row in rows]
    return "\n".join(
        f"{name:20}{row['accuracy']:.4f}{spread}" for (name, row), spread in zip(rows, spreads, strict=True)
    )


def _selected_vectors(path: str, labels: str | None, select: list[str] | None) -> Embeddings:
    if select:
        raise ValueError("--select chooses rows of a manifest; stored vectors have no columns.")
    return _vectors(path, labels)


def _oneshot(options: argparse.Namespace) -> Result:
    from embedlab._machine import processor_name, versions
    from embedlab.data.images import available_cores
    from embedlab.retrieval.embedders import as_embedder, on_device
    from embedlab.retrieval.oneshot import draw_runs, evaluate_runs, read_runs
    from embedlab.retrieval.subjects import with_digest

    _require(options, "draw", "runs", "ways", "seed")
    runs = [] if options.draw else read_runs(options.path)  # an error before the encoder is loaded
    encoder: Any = on_device(as_embedder(options.encoder))
    drawing: dict[str, Any] = {}
    if options.draw:
        drawing = {"runs": 20, "ways": 20, "seed": 0} | _given(options, "runs", "ways", "seed")
        drawing["alphabets"] = draw_runs(options.draw, options.path, **drawing)
        runs = read_runs(options.path)
    result = evaluate_runs(encoder, options.path, runs, batch_size=options.batch_size, precision=options.precision)
    protocol = {name: getattr(options, name) for name in ("path", "draw", "precision")} | drawing
    protocol |= with_digest({"fingerprint": encoder.fingerprint, "preprocessing": encoder.preprocessing})
    protocol |= {
        "decision": "each trial alone: the training image of its run with the highest cosine",
        "intervals": {
            "confidence": 0.95,
            "method": "percentile bootstrap over runs; Wilson's score interval over trials where all have one error",
            "resamples": 2000,
            "seed": 0,
        },
        "versions": versions("torch", "torchvision", "numpy", "pillow"),
        "hardware": {"processor": processor_name(), "cores": available_cores()},
    }
    low, high = result["interval"]
    lines = [f"{run['run']:10}{run['error']:7.1%}  of {run['trials']}, {run['ways']} ways" for run in result["runs"]]
    lines.append(
        f"error {result['error']:.2%} [{low:.2%}, {high:.2%}], mean of {len(runs)} runs with {result['trials']} trials;"
        f" 95 % over {result['interval_over']}"
    )
    return {**result, "protocol": protocol, "text": "\n".join(lines)}


def _audit(options: argparse.Namespace) -> Result:
    from embedlab.retrieval.audit import audit

    _spare_inputs(options, "out")
    rows = _vectors(options.path, options.labels)
    if rows.labels is None:
        raise ValueError(f"{options.path} has no labels; name a file with them: embedlab audit VECTORS LABELS.")
    found = audit(rows.vectors, rows.labels, rows.ids, fpir=options.fpir, duplicate=options.duplicate)
    result, text = found.to_dict(), found.to_text()
    if options.out:
        from embedlab.serving.report import audit_report, file_picture

        keys = rows.ids.tolist()
        paths = dict(zip(keys, rows.paths or [], strict=False))
        document = audit_report(found, rows.labels, keys, lambda key: file_picture(paths.get(key)))
        result |= _write_report(options.out, document)
        text += f"\n\n{options.out}: open it in a browser"
    return {**result, "text": text}


def _finetune(options: argparse.Namespace) -> Result:
    from embedlab.data import ImageData, Views
    from embedlab.encoders import Encoder
    from embedlab.losses import FocalLoss
    from embedlab.tasks import finetune

    if options.split == "column" and options.fractions:
        raise ValueError(
            "--fractions belongs to --split sample or group; --split column takes the roles that stand in the "
            "manifest. Leave out one of the two."
        )
    encoder = Encoder.load(options.encoder or options.scratch_like)
    if options.scratch_like:
        encoder = encoder.untrained(seed=options.seed)
    if options.run.is_dir() and any(options.run.iterdir()):
        raise ValueError(f"{options.run} is not empty; choose another folder by --run, or delete it.")
    data = ImageData(
        options.path,
        select=_selection(options.select),  # type: ignore[arg-type]
        split=options.split,
        fractions=tuple(options.fractions or (0.7, 0.0, 0.3)),
        labels_per_class=options.labels_per_class,
        batch_size=options.batch_size,
        views=Views(crop_scale=(options.crop, 1.0), flip=options.flip, quarter_turn=options.quarter_turn),
        seed=options.seed,
        on_error=options.on_error,
        **encoder.preprocessing,
    )
    loss = FocalLoss() if options.loss == "focal" else None
    report = finetune(
        data,
        encoder,
        steps=options.steps,
        rate=options.rate,
        backbone_rate=options.backbone_rate,
        classifier=options.classifier,
        loss=loss,
        freeze=options.freeze,
        positive=options.positive,
        beta=options.beta,
        seed=options.seed,
        run=options.run,
        progress=not options.json,
    )
    low, high = report["intervals"].get("accuracy", (float("nan"),) * 2)
    text = (
        f"accuracy {report['accuracy']:.3f} [{low:.3f}, {high:.3f}]  balanced {report['balanced_accuracy']:.3f}  "
        f"F{options.beta:g} {report['f_beta']:.3f}  MCC {report['mcc']:.3f}  AUC {report['auc']:.3f}  "
        f"on {report['test_images']} test images, {len(report['classes'])} classes, {report['seconds']:.0f} s: "
        f"{options.run}"
    )
    return {"run": str(options.run), **report, "text": text}


def _export(options: argparse.Namespace) -> Result:
    from embedlab.encoders import Encoder
    from embedlab.serving.export import export_encoder, export_gallery, is_gallery

    images = None if options.images is None else _source(options.images, options.select)
    if is_gallery(options.encoder):
        if options.format != "onnx" or options.overwrite:
            raise ValueError("A gallery is exported as ONNX into a new folder; leave out --format and --overwrite.")
        report = export_gallery(options.encoder, options.out, images=images, on_error=options.on_error).to_dict()
    else:
        report = export_encoder(
            Encoder.load(options.encoder),
            options.out,
            format=options.format,
            images=images,
            on_error=options.on_error,
            overwrite=options.overwrite,
        ).to_dict()
    recall = report["recall_at_1"]
    text = (
        f"{report['path']}: {report['bytes'] / 1e6:.1f} MB, {report['dim']} numbers per image\n"
        f"like the encoder on {report['images']} images: vectors differ by {report['max_difference']:.1e} at most"
        + ("" if recall is None else f", recall@1 is {recall:.3f} with both")
    )
    return {**report, "text": text}


def _create(options: argparse.Namespace) -> Result:
    from embedlab.retrieval import Gallery

    with Gallery.create(
        options.gallery,
        options.encoder,
        dim=options.dim,
        thumbnails=options.thumbnails,
        **_given(options, *SETTINGS),
    ) as gallery:
        return {**gallery.info(), "text": f"{options.gallery}: empty gallery for {gallery.dim} numbers per vector"}


def _configure(options: argparse.Namespace) -> Result:
    from embedlab.retrieval import Gallery

    wanted = _given(options, *SETTINGS, "normalisation", "cohort_k")
    if not wanted and not options.cohort:
        raise ValueError("gallery configure takes what to change, such as --fusion mean; 'gallery info' shows it all.")
    with Gallery.open(options.gallery, options.encoder) as gallery:
        cohort = None
        if options.cohort:
            vectors = _is_vectors(options.cohort)
            cohort = _vectors(options.cohort, None) if vectors else gallery.embed(_source(options.cohort, None))
        before = gallery.calibration
        gallery.configure(cohort=cohort, **wanted)
        lost = before is not None and gallery.calibration is None
        text = f"{options.gallery} is configured" + (
            " and not calibrated any more; run 'embedlab gallery calibrate'" if lost else ""
        )
        return {**gallery.info(), "text": text}


def _enroll(options: argparse.Namespace) -> Result:
    from embedlab.retrieval import Gallery

    with Gallery.open(options.gallery, options.encoder) as gallery:
        found = _probes(options, gallery)
        labels: Any = options.label or _require_labels(found.labels, options.path)
        ids = gallery.enroll(embeddings=found, labels=labels, key=options.key)
        counts = gallery.counts()
        return {
            "ids": ids,
            "enrolled": len(ids),
            "identities": len(counts),
            "templates": len(gallery),
            "text": f"enrolled {len(ids)} templates; {options.gallery} has {len(gallery)} of {len(counts)} identities",
        }


def _remove(options: argparse.Namespace) -> Result:
    from embedlab.retrieval import Gallery

    if bool(options.label) == bool(options.id):
        raise ValueError("gallery remove takes either --label or --id.")
    with Gallery.open(options.gallery) as gallery:
        count = gallery.remove(labels=options.label, ids=options.id, purge=options.purge)
        return {
            "removed": count,
            "templates": len(gallery),
            "text": f"removed {count} templates, {len(gallery)} remain",
        }


def _rename(options: argparse.Namespace) -> Result:
    from embedlab.retrieval import Gallery

    with Gallery.open(options.gallery) as gallery:
        count = gallery.rename(options.old, options.new)
        return {"renamed": count, "text": f"{count} templates of {options.old!r} are now {options.new!r}"}


def _merge(options: argparse.Namespace) -> Result:
    from embedlab.retrieval import Gallery

    with Gallery.open(options.gallery) as gallery:
        count = gallery.merge(options.source, options.into)
        return {"merged": count, "text": f"{count} templates of {options.source!r} now belong to {options.into!r}"}


def _list(options: argparse.Namespace) -> Result:
    from embedlab.retrieval import Gallery

    with Gallery.open(options.gallery, read_only=True) as gallery:
        counts = gallery.counts()
    lines = [f"{count:6d}  {label}" for label, count in sorted(counts.items())]
    return {"identities": counts, "text": "\n".join(lines) or "(empty)"}


def _search(options: argparse.Namespace) -> Result:
    from embedlab.retrieval import Gallery

    with Gallery.open(options.gallery, options.encoder, read_only=True) as gallery:
        probes = _probes(options, gallery)
        found = gallery.search(embeddings=probes.vectors, k=options.k, per=options.per)
    rows: list[Result] = []
    for row, name in enumerate(_names(probes)):
        ranked = zip(found.ids[row].tolist(), found.labels[row], found.scores[row].tolist(), strict=True)
        rows.append({"probe": name, "neighbours": [{"id": i, "label": n, "score": s} for i, n, s in ranked if i >= 0]})
    lines = []
    for found_row in rows:
        lines += [found_row["probe"], *(f"  {near['score']:.3f}  {near['label']}" for near in found_row["neighbours"])]
    return {"results": rows, "text": "\n".join(lines)}


def _identify(options: argparse.Namespace) -> Result:
    from embedlab.retrieval import Gallery
    from embedlab.retrieval.open_set import evaluate_gallery

    _spare_inputs(options, "show")
    with Gallery.open(options.gallery, options.encoder, read_only=True) as gallery:
        probes = _several_probes(options, gallery)
        probes = _as_one(probes) if options.one_probe else probes
        answers = gallery.identify(embeddings=probes.vectors, k=options.k)
        enrolled = set(gallery.labels())
        labelled = probes.labels is not None and any(label in enrolled for label in probes.labels)
        report = evaluate_gallery(gallery, probes).to_dict() if labelled and gallery.calibration else None
        if options.show:
            _show(options.show, gallery, probes, answers)
    rows = [{"probe": name, **answer.to_dict()} for name, answer in zip(_names(probes), answers, strict=True)]
    lines = [f"{row['score'] or 0:.3f}  {row['label'] or 'unknown':30s}  {row['probe']}" for row in rows]
    if rows and not enrolled:
        lines.append("The gallery is empty: nobody is enrolled. Run 'embedlab gallery enroll'.")
    elif rows and not rows[0]["calibrated"]:
        lines.append(
            "The gallery is not calibrated, so every answer is unknown; the best guesses are "
            + ", ".join(sorted({str(row["best"]) for row in rows})[:5])
            + ". Run 'embedlab gallery calibrate' with images of strangers."
        )
    elif rows and not report:
        lines.append(f"threshold {rows[0]['threshold']:.4f}")
    if report:
        lines.append(_open_set_lines(report))
    return {"results": rows, "report": report, "text": "\n".join(lines)}


def _show(path: Path, gallery: Any, probes: Embeddings, answers: Any) -> None:
    from io import BytesIO

    from PIL import Image

    from embedlab.data.images import image_pixels
    from embedlab.serving.pictures import draw_identifications
    from embedlab.serving.report import file_picture, template_pictures

    def pixels(content: bytes | None) -> Any:
        return None if content is None else image_pixels(Image.open(BytesIO(content)))

    pictures = template_pictures(gallery)
    draw_identifications(
        path, answers, [pixels(file_picture(name)) for name in _names(probes)], lambda key: pixels(pictures(key))
    )


def _open_set_lines(report: Result) -> str:
    def shown(name: str) -> str:
        low, high = report["intervals"][name]
        return f"{report[name]:.3f} [{low:.3f}, {high:.3f}]"

    lines = [
        f"closed-set accuracy  {shown('closed_set_accuracy')}  ({report['enrolled']} enrolled)",
        f"detection rate       {shown('detection_rate')}  at threshold {report['threshold']:.3f}",
    ]
    if report["observed_fpir"] is not None:
        lines.append(
            f"observed FPIR        {shown('observed_fpir')}  promised {report['target_fpir']:.3f} "
            f"({report['strangers']} strangers)"
        )
    return "\n".join(lines)


def _verify(options: argparse.Namespace) -> Result:
    from embedlab.retrieval import Gallery

    with Gallery.open(options.gallery, options.encoder, read_only=True) as gallery:
        probes = _probes(options, gallery)
        probes = _as_one(probes) if options.one_probe else probes
        answers = [gallery.verify(options.label, embedding=vector) for vector in probes.vectors]
    word = {True: "accepted", False: "rejected", None: "uncalibrated"}
    rows = [{"probe": name, **answer.to_dict()} for name, answer in zip(_names(probes), answers, strict=True)]
    return {
        "results": rows,
        "text": "\n".join(f"{r['score']:.3f}  {word[r['accepted']]:12s}  {r['probe']}" for r in rows),
    }


def _calibrate(options: argparse.Namespace) -> Result:
    from embedlab.retrieval import Gallery

    if options.leave_identity_out == (options.path is not None):
        raise ValueError("gallery calibrate takes either PATH with strangers or --leave-identity-out.")
    if options.leave_identity_out and options.one_probe:
        raise ValueError("--one-probe belongs to PATH with strangers; --leave-identity-out asks with single templates.")
    with Gallery.open(options.gallery, options.encoder) as gallery:
        strangers = None if options.leave_identity_out else _probes(options, gallery)
        found = gallery.calibrate(
            embeddings=strangers,
            probes=_require_labels(strangers.labels, options.path) if strangers and options.one_probe else None,
            leave_identity_out=options.leave_identity_out,
            fpir=options.fpir,
            fmr=options.fmr,
            growth=options.growth,
        )
    text = (
        f"threshold {found.threshold:.4f}: with {found.confidence:.0%} confidence at most {found.fpir:.1%} of "
        f"strangers are taken for somebody\n(bound {found.bound:.2%}, observed {found.observed:.2%} on "
        f"{found.images} images of {found.strangers} strangers, worth {found.effective_strangers:.0f} independent ones)"
    )
    if found.growth > 1:
        text += f"\nfor up to {int(found.growth * (found.gallery_identities or 0))} identities"
    if found.genuine_images:
        text += f"\n{found.genuine_images} images carry names that are enrolled: genuine probes, which set no threshold"
    return {**found.to_dict(), "text": text}


def _check(options: argparse.Namespace) -> Result:
    from embedlab.retrieval import Gallery

    with Gallery.open(options.gallery, read_only=True) as gallery:
        report = gallery.check()
    text = "\n".join(report.problems) or f"{report.templates} templates, all whole"
    return {**report.to_dict(), "exit": 0 if report.ok else 1, "text": text}


def _backup(options: argparse.Namespace) -> Result:
    from embedlab.retrieval import Gallery

    with Gallery.open(options.gallery, read_only=True) as gallery:
        folder = gallery.backup(options.out)
    return {"backup": str(folder), "text": f"{folder} holds a verified copy"}


def _compact(options: argparse.Namespace) -> Result:
    from embedlab.retrieval import Gallery

    with Gallery.open(options.gallery) as gallery:
        saved = gallery.compact()
    return {"bytes_saved": saved, "text": f"{saved} bytes given back"}


def _migrate(options: argparse.Namespace) -> Result:
    from embedlab.retrieval.embedders import as_embedder, on_device
    from embedlab.retrieval.migration import Recalibration, migrate

    found = migrate(
        options.gallery,
        None if options.encoder is None else on_device(as_embedder(options.encoder)),
        to=options.to,
        recalibration=Recalibration(
            strangers=options.strangers and _source(options.strangers, None),
            one_probe=options.one_probe,
            leave_identity_out=options.leave_identity_out,
            fpir=options.fpir,
            fmr=options.fmr,
            growth=options.growth,
        ),
        probes=options.probes and _source(options.probes, None),
        cohort=options.cohort and _source(options.cohort, None),
        drop=options.drop_missing,
        switch=not options.no_switch,
    )
    return {**found.to_dict(), "text": found.to_text()}


def _info(options: argparse.Namespace) -> Result:
    from embedlab.retrieval import Gallery

    with Gallery.open(options.gallery, read_only=True) as gallery:
        info = gallery.info()
    shown = {name: value for name, value in info.items() if not isinstance(value, dict)}
    shown |= info["settings"] | {"normalisation": "as-norm" if info["settings"].get("normalisation") else "none"}
    shown["search"] = f"{info['search']['kind']}, now {info['search']['used']}"
    if promise := info["calibration"]:
        digits = {"threshold": ".4f", "verification_threshold": ".4f", "fpir": ".4g", "bound": ".4g", "source": ""}
        shown |= {name: format(promise[name], form) for name, form in digits.items() if promise[name] is not None}
    lines = [f"{name:22s}  {value}" for name, value in shown.items() if value is not None]
    return {**info, "text": "\n".join(lines)}


def _report(options: argparse.Namespace) -> Result:
    from embedlab.retrieval import Gallery
    from embedlab.serving.report import gallery_report

    _spare_inputs(options, "out")
    with Gallery.open(options.gallery, read_only=True) as gallery:
        document = gallery_report(gallery)
    return _write_report(options.out, document) | {"text": f"{options.out}: open it in a browser"}


def _write(path: Path, text: str) -> None:
    """A file appears whole or stays what it was; a pipe or a terminal gets the text."""
    if _streams(path):
        path.write_text(text, encoding="utf-8")
    else:
        write_file(Path(os.path.realpath(path)), text.encode())  # through a link to what it leads to


def _write_report(path: Path, document: str) -> Result:
    _write(path, document)
    return {"report": str(path), "bytes": path.stat().st_size}


def _serve(options: argparse.Namespace) -> Result:
    try:
        from embedlab.serving.server import serve
    except ImportError as error:
        raise ImportError(f"embedlab serve needs {error.name}: pip install 'embedlab[web]'") from error
    serve(
        options.gallery,
        options.encoder,
        host=options.host,
        port=options.port,
        key_file=options.key_file,
        allow_hosts=options.allow_host,
        max_body=options.max_body,
        read_only=options.read_only,
        inbox_days=options.inbox,
    )
    return {"text": "stopped"}


def _names(embeddings: Embeddings) -> list[str]:
    return embeddings.paths or [f"row {number}" for number in embeddings.ids.tolist()]
