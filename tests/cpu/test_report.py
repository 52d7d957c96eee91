"""The report of whole, partial and odd runs."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image
from rich.console import Console

from moetrain.config import MetricsConfig
from moetrain.metrics import EvalRecord, Metrics, StepRecord
from moetrain.report import _smooth, write_report


def write_run(folder: Path, steps: int, evals: list[tuple[int, float]], dense: bool = False, **info: int) -> None:
    out = Metrics(MetricsConfig(), folder, 0, 100, run="<my & run>", info=info, console=Console(file=io.StringIO()))
    for step, loss in evals:
        out.eval(EvalRecord(step=step, loss=loss, tokens=64))
    for step in range(1, steps + 1):
        out.step(
            StepRecord(
                step=step,
                loss=8.0 / step if step != 2 else math.nan,
                grad_norm=1.0,
                lr=1e-3,
                tokens=1000,
                tokens_per_second=500.0 if step == 1 else 2000.0,
                step_seconds=2.0 if step == 1 else 0.5,
                memory_bytes=step * 2**30,
                expert_load_max_over_mean=None if dense else 1.5,
            )
        )
    out.close()


class Rows(HTMLParser):
    """The summary table of a page as name -> text."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.inside = False
        self.feed(page.read_text())
        self.rows = dict(zip(self.cells[::2], self.cells[1::2], strict=True))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.inside = tag in ("th", "td")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.cells.append(data)


def test_summary_and_picture(tmp_path: Path) -> None:
    write_run(tmp_path, 50, [(0, 8.25), (25, 5.0), (50, 4.0)], vocab_size=4096)
    (tmp_path / "config.yaml").write_text("optim:\n  lr: 0.001  # <fast>\n")
    page = write_report(tmp_path)
    assert page == tmp_path / "report.html"
    rows = Rows(page).rows
    assert rows["steps"] == "50 of 100"
    assert rows["label tokens"] == "50,000"
    assert rows["speed"] == "2,000 tokens/s (median)"
    assert rows["time in steps"] == "26 s"
    assert rows["memory, rank 0"] == "50.0 GiB at its peak"
    assert rows["validation loss"] == "8.250 at first, 4.000 at last, -4.250 nats"
    assert rows["ln(vocabulary)"].startswith(f"{math.log(4096):.3f} for 4,096 entries")
    text = page.read_text()
    assert "lr: 0.001  # &lt;fast&gt;" in text
    assert "&lt;my &amp; run&gt;" in text and "<my" not in text


def test_page_needs_nothing_beside_itself(tmp_path: Path) -> None:
    write_run(tmp_path, 3, [(0, 8.25)])
    text = write_report(tmp_path).read_text()
    links = re.findall(r"(?:src|href)=\"([^\"]{0,40})|url\(|@import", text)
    assert len(links) == 1 and links[0].startswith("data:image/png;base64,")
    inlined = re.search(r"base64,([^\"]+)", text)
    assert inlined is not None
    picture = base64.b64decode(inlined[1])
    assert picture == (tmp_path / "run.png").read_bytes()
    assert Image.open(io.BytesIO(picture)).size[0] >= 1200


@pytest.mark.parametrize(
    ("steps", "evals", "dense"),
    [
        (0, [(0, 8.0)], False),
        (1, [], False),
        (2, [(0, math.nan)], True),
        (30, [(0, 8.0), (10, math.nan)], False),
    ],
)
def test_partial_runs(tmp_path: Path, steps: int, evals: list[tuple[int, float]], dense: bool) -> None:
    write_run(tmp_path, steps, evals, dense)
    rows = Rows(write_report(tmp_path)).rows
    assert ("steps" in rows) == (steps > 0)
    assert ("validation loss" in rows) == bool(evals)
    assert ("expert load" in rows) == (steps > 0 and not dense)
    assert Image.open(tmp_path / "run.png").size[0] >= 1200


def test_torn_line_of_a_running_job(tmp_path: Path) -> None:
    write_run(tmp_path, 3, [])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 4, "lo')
    assert Rows(write_report(tmp_path)).rows["steps"] == "3 of 100"


def test_vocabulary_from_the_exported_model(tmp_path: Path) -> None:
    write_run(tmp_path, 1, [])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"text_config": {"vocab_size": 512}}')
    assert "512 entries" in Rows(write_report(tmp_path)).rows["ln(vocabulary)"]


def test_no_run_here(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metrics\.jsonl in .*: name the output_dir of a run"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run"}\n')
    with pytest.raises(ValueError, match="holds no step yet"):
        write_report(tmp_path)


def test_smoothing_follows_a_line_and_passes_gaps() -> None:
    line = [10.0 - 0.1 * i for i in range(100)]
    assert _smooth(line)[:98] == pytest.approx(line[:98])
    assert _smooth([1.0, math.nan, 3.0, 5.0, 7.0])[1] == pytest.approx(2.0)
    assert math.isnan(_smooth([math.nan])[0])
