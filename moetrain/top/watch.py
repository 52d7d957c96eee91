"""The loop of `moetrain top`: read, show, wait, until the run ends or somebody has seen enough."""

from __future__ import annotations

import time
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.text import Text

from moetrain.top.follow import FileSource
from moetrain.top.prometheus import PrometheusSource
from moetrain.top.snapshot import Snapshot, warnings
from moetrain.top.view import line, screen

INTERVAL = 2.0


class Source(Protocol):
    """Where snapshots come from."""

    name: str

    def read(self) -> Snapshot: ...


def top(run: str, prometheus: str | None = None, once: bool = False, interval: float = INTERVAL) -> int:
    """Show a run until it ends, or until Ctrl-C; returns the exit code.

    Args:
        run: its output_dir; with `prometheus` its name in monitoring.
        prometheus: address of the server.
        once: show what is known now and end.
        interval: seconds between two looks.

    Raises:
        ValueError: with `once` there is nothing to see; the server does not answer, or knows no such run.
    """
    console = Console()
    source: Source = FileSource(run) if prometheus is None else PrometheusSource(prometheus, run)
    try:
        shot = _read_first(source, once)
        if once:
            console.print(
                screen(shot, source.name, console) if console.is_terminal else Text(_lines(shot)), soft_wrap=True
            )
        elif console.is_terminal:
            _live(source, shot, console, interval)
        else:
            _log(source, shot, console, interval)
    except KeyboardInterrupt:
        return 0  # the way to end it
    return 0


def _read_first(source: Source, once: bool) -> Snapshot:
    """The first look, which also finds out whether there is anything to look at."""
    try:
        shot = source.read()
    except OSError as error:
        raise ValueError(f"{source.name} does not answer: {getattr(error, 'reason', error)}") from error
    if shot.state == "waiting" and (once or isinstance(source, PrometheusSource)):
        if isinstance(source, PrometheusSource):
            known = source.runs()
            there = f"; it knows {', '.join(known[:20])}" if known else "; it knows no run at all"
            if once or known:
                raise ValueError(f"no run of this name: {source.name}{there}. Name it as metrics.run_name does")
        else:
            raise ValueError(f"nothing of a run in {source.name} yet: name the output_dir of a run")
    return shot


def _live(source: Source, shot: Snapshot, console: Console, interval: float) -> None:
    """A screen of its own; what it showed last stays when it goes."""
    try:
        with Live(console=console, screen=True, auto_refresh=False) as live:
            while True:
                live.update(screen(shot, source.name, console), refresh=True)
                if shot.ended:
                    break
                time.sleep(interval)
                shot = _read_again(source, shot)
    finally:
        console.print(screen(shot, source.name, console))


def _log(source: Source, shot: Snapshot, console: Console, interval: float) -> None:
    """A line for each step that is seen, and one for each new warning."""
    shown: tuple[int, str] | None = None
    warned: set[str] = set()
    while True:
        if (shot.step, shot.state) != shown:
            shown = (shot.step, shot.state)
            console.print(Text(line(shot)), soft_wrap=True)
        found = {_kind(text): text for text in warnings(shot)}
        for kind, text in found.items():
            if kind not in warned:
                console.print(Text(f"! {text}"), soft_wrap=True)
        warned = set(found)
        if shot.ended:
            return
        time.sleep(interval)
        shot = _read_again(source, shot)


def _read_again(source: Source, before: Snapshot) -> Snapshot:
    """A new look; where that fails, the one before with the reason."""
    try:
        return source.read()
    except (OSError, ValueError) as error:
        before.now = time.time()
        before.trouble = f"{source.name} does not answer: {getattr(error, 'reason', error)}"
        return before


def _kind(warning: str) -> str:
    """Without its figures, which change all the time."""
    return "".join(c for c in warning if not c.isdigit())


def _lines(shot: Snapshot) -> str:
    return "\n".join([line(shot), *(f"! {text}" for text in warnings(shot))])
