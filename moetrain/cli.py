"""The command line: `moetrain train | export | data | top | report | bench | plan | doctor`.

Torch and Transformers are imported by the verbs that need them, so that `--help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moetrain.bench.commands import add_bench, check_names, name_part, positive, run_bench
from moetrain.plan.arguments import add_plan

if TYPE_CHECKING:
    from moetrain.config import RunConfig

USER_ERROR = 2
INTERRUPTED = 130
READER_GONE = 128 + signal.SIGPIPE
DISK_ERRNOS = (
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO),
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. What the user can mend is one `error:` block and code 2, no traceback."""
    try:
        args = _parse(argv)
        _mind_readers(goes_on=args.verb is train)
        code: int = args.verb(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read the output has enough of it, as `head` does
        _discard_output()
        return READER_GONE
    except Exception as error:
        if not _users_to_mend(error) or os.environ.get("MOETRAIN_DEBUG"):
            raise
        _print_error(error)
        return USER_ERROR
    return code


def train(args: argparse.Namespace) -> int:
    from moetrain.config import load_config
    from moetrain.launcher import launch

    args.overrides += [f"model.{name}={value}" for name in ("kernels", "dispatch") if (value := getattr(args, name))]
    if args.print_config:
        from moetrain.report import config_yaml

        print(config_yaml(load_config(args.config, args.overrides)), end="")
        return 0
    if args.dry_run:
        from moetrain.dry_run import dry_run

        dry_run(load_config(args.config, args.overrides))
        return 0
    _log_to_console()
    return launch(args.config, args.overrides)


def export(args: argparse.Namespace) -> int:
    from moetrain.checkpoint import export_run

    _log_to_console()
    export_run(args.checkpoint, args.out, source=args.source)
    print(f"wrote {args.out}, a checkpoint in Hugging Face format")
    return 0


def data_preview(args: argparse.Namespace) -> int:
    from rich import get_console

    from moetrain.config import load_config
    from moetrain.data import preview

    config = load_config(args.config, args.overrides)
    preview(config.data, _tokenizer(config), args.rows, get_console())
    return 0


def data_tokenize(args: argparse.Namespace) -> int:
    from moetrain.config import load_config
    from moetrain.data import tokenize_config

    config = load_config(args.config, args.overrides)
    for source, path in tokenize_config(config.data, _tokenizer(config), Path(args.out)):
        print(f"{source.path}: wrote {path}")
    return 0


def top(args: argparse.Namespace) -> int:
    from moetrain.top import top

    return top(args.run, prometheus=args.prometheus, once=args.once, interval=args.interval)


def report(args: argparse.Namespace) -> int:
    from moetrain.report import report

    for path in report(args.run_dirs, args.out):
        print(f"wrote {path}")
    return 0


def bench(args: argparse.Namespace) -> int:
    from moetrain.launcher import free_port, is_rank, rank_environment, run_local

    check_names(args)  # a wrong name costs no start of ranks
    if args.on_ranks and not is_rank():
        processes = args.processes or _count_gpus() or 1
        if processes > 1:
            return run_local([sys.executable, "-m", "moetrain", *args.words], processes, Path(args.out) / "logs")
        os.environ.update(rank_environment(0, 1, free_port()))
    return run_bench(args)


def plan(args: argparse.Namespace) -> int:
    from moetrain.plan.command import run

    return run(args)


def doctor(args: argparse.Namespace) -> int:
    from moetrain.doctor import examine

    chosen = None
    if args.config is not None:
        from moetrain.config import load_config
        from moetrain.dry_run import explain

        chosen = explain(load_config(args.config, args.overrides))
    return examine(as_json=args.json, chosen=chosen)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    words = list(sys.argv[1:] if argv is None else argv)
    args, rest = parser.parse_known_args(name_part(words))
    args.words = words
    # argparse takes positionals once; overrides may also stand behind an option
    if rest and ("overrides" not in args or any(word.startswith("-") for word in rest)):
        args.parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if "overrides" in args:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="moetrain",
        description="Fine-tune Mixture-of-Experts models of Transformers with expert parallelism.",
        epilog="Exit codes: 0 done; 75 told to stop (SIGTERM, SIGUSR1, SIGUSR2, Ctrl-C) and saved, the same command "
        "goes on; 2 an error you can mend; 128 + n ended by signal n; others are bugs. MOETRAIN_DEBUG=1 shows the "
        "traceback of an error.",
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    verbs = parser.add_subparsers(title="verbs", required=True, metavar="VERB")

    sub = _verb(
        verbs,
        "train",
        train,
        "run a training from a YAML file",
        "moetrain train configs/python_stdlib.yaml",
        "moetrain train my.yaml optim.lr=2e-5 parallel.ep_size=8",
        "moetrain train my.yaml --kernels te --dispatch deepep",
        "moetrain train my.yaml --dry-run",
        "torchrun --nproc-per-node 8 -m moetrain train my.yaml",
    )
    _add_config(sub)
    sub.add_argument("--kernels", metavar="NAME", help="model.kernels, such as te (transformer_engine)")
    sub.add_argument("--dispatch", metavar="NAME", help="model.dispatch, such as deepep (deep_ep)")
    sub.add_argument("--print-config", action="store_true", help="print every value with its documentation")
    sub.add_argument("--dry-run", action="store_true", help="check config, model, data, layout; start nothing")

    sub = _verb(
        verbs,
        "export",
        export,
        "turn a training checkpoint into one in Hugging Face format",
        "moetrain export runs/mine/checkpoints/step-00001000 mine-hf",
    )
    sub.add_argument("checkpoint", metavar="CHECKPOINT", help="directory of a training checkpoint")
    sub.add_argument("out", metavar="OUT", help="directory to make")
    sub.add_argument("--source", metavar="DIR", help="the checkpoint that the run started from, if it has moved")

    data = verbs.add_parser(
        "data",
        help="look at the training data, or tokenize it",
        epilog="examples:\n  moetrain data preview my.yaml --rows 3\n  moetrain data tokenize my.yaml --out corpus",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).add_subparsers(title="verbs", required=True, metavar="VERB")
    sub = _verb(
        data,
        "preview",
        data_preview,
        "show packed rows, the tokens that carry loss coloured",
        "moetrain data preview my.yaml --rows 3",
    )
    _add_config(sub)
    sub.add_argument("--rows", type=positive, default=1, metavar="N", help="rows to show (default: 1)")
    sub = _verb(
        data,
        "tokenize",
        data_tokenize,
        "write the data as memory-mapped token files, to be named as sources of format `tokens`",
        "moetrain data tokenize my.yaml --out corpus",
    )
    _add_config(sub)
    sub.add_argument("--out", required=True, metavar="DIR", help="directory for one file a source")

    sub = _verb(
        verbs,
        "top",
        top,
        "watch a run in the terminal; lines where there is no terminal",
        "moetrain top runs/mine",
        "moetrain top mine --prometheus http://monitor:9090",
        "moetrain top runs/mine --once",
    )
    sub.add_argument("run", metavar="RUN", help="output_dir of the run; with --prometheus its name")
    sub.add_argument("--prometheus", metavar="URL", help="ask this server, where the run's folder is out of reach")
    sub.add_argument("--once", action="store_true", help="show what is known now and end")
    sub.add_argument("--interval", type=float, default=2.0, metavar="SECONDS", help="between two looks (default: 2)")

    sub = _verb(
        verbs,
        "report",
        report,
        "draw a run, finished or not, or several to compare: a page that needs no network, and pictures",
        "moetrain report runs/mine",
        "moetrain report runs/mine runs/other --out comparison.html",
    )
    sub.add_argument("run_dirs", metavar="RUN", nargs="+", help="output_dir of a run")
    sub.add_argument(
        "--out", metavar="FILE", help="the page (default: report.html of the run, or comparison.html here)"
    )

    add_bench(verbs, _verb, bench)
    add_plan(verbs, _verb, plan)

    sub = _verb(
        verbs,
        "doctor",
        doctor,
        "show versions, GPUs and which backends are usable, and what a run would use; code 1 if training cannot run",
        "moetrain doctor",
        "moetrain doctor --json",
        "moetrain doctor configs/python_stdlib.yaml",
    )
    sub.add_argument(
        "config", nargs="?", metavar="CONFIG", help="YAML file: also what this run would use here, and why"
    )
    _add_overrides(sub)
    sub.add_argument("--json", action="store_true", help="for programs")
    return parser


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _verb(
    verbs: Any, name: str, run: Callable[[argparse.Namespace], int], what: str, *examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = verbs.add_parser(
        name,
        help=what,
        description=what[0].upper() + what[1:] + ".",
        epilog="examples:\n" + "\n".join(f"  {example}" for example in examples),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(verb=run, parser=parser)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="CONFIG", help="YAML file of the run")
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", default=(), metavar="a.b=c", help="overrides, such as optim.lr=1e-5")


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from moetrain import __version__

        print(f"moetrain {__version__}")
        parser.exit()


def _tokenizer(config: RunConfig) -> Any:
    """The tokenizer of `model.path`; a checkpoint that the run would create is created now."""
    from moetrain.create import create_checkpoint, find_checkpoint, load_tokenizer
    from moetrain.data import training_texts
    from moetrain.prepare import keep_quiet

    keep_quiet()
    if config.model.create is not None:
        create_checkpoint(Path(config.model.path), config.model.create, training_texts(config.data), config.train.seed)
    return load_tokenizer(find_checkpoint(config.model.path), config.model)


def _users_to_mend(error: Exception) -> bool:
    """Whether the error is about what the user gave: our ValueErrors, a non-finite step, the disk, the hub."""
    if isinstance(error, OSError):
        return error.errno is None or error.errno in DISK_ERRNOS  # Transformers and the hub raise it with a text only
    return isinstance(error, ValueError | FloatingPointError)


def _print_error(error: Exception) -> None:
    from rich.console import Console
    from rich.text import Text

    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without the number, which says the same
        text = ": ".join(str(part) for part in (error.filename, error.strerror) if part)
    console = Console(stderr=True)
    console.print(Text.assemble(("error: ", "bold red"), (text, "red")), soft_wrap=True)
    if not isinstance(error, FloatingPointError):
        console.print(Text("MOETRAIN_DEBUG=1 shows where it was raised", "dim"), soft_wrap=True)


def _mind_readers(goes_on: bool) -> None:
    """What rich does where the reader of the output has gone; of itself it ends the process, with the code of a bug.

    Args:
        goes_on: a training, which ends for no reader.
    """
    from rich.console import Console

    def gone(console: Console) -> None:
        if not goes_on:
            raise BrokenPipeError
        console.quiet = True
        _discard_output()

    setattr(Console, "on_broken_pipe", gone)  # noqa: B010 - for the type checker


def _discard_output() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


def _log_to_console() -> None:
    """Show moetrain's log on the console that also holds the progress bar, so that lines appear above it."""
    from rich import get_console
    from rich.text import Text

    class ConsoleHandler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            style = "yellow" if record.levelno >= logging.WARNING else ""
            get_console().print(Text(self.format(record), style), soft_wrap=True)

    logger = logging.getLogger("moetrain")
    logger.setLevel(logging.INFO)
    logger.addHandler(ConsoleHandler())
    logger.propagate = False
