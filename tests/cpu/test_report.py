"""The report of whole, partial, odd, hostile and long runs."""

from __future__ import annotations

import io
import json
import math
import random
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from moetrain.config import MetricsConfig
from moetrain.metrics import EvalRecord, Expectation, LayerLoads, Memory, Metrics, StepRecord
from moetrain.report import report, write_comparison, write_report
from moetrain.report.charts import Line, reading
from moetrain.report.curves import Scale, envelope, scale_for, smooth, ticks, worst
from moetrain.report.settings import differences
from moetrain.report.style import DARK, LIGHT
from moetrain.report.text import duration, short

EVIL = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>&amp;\x1b[2J\ud800"


def write_run(folder: Path, steps: int, evals: list[tuple[int, float]], dense: bool = False, **info: Any) -> None:
    """By the recorder itself, so that the page reads what runs write."""
    folder.mkdir(parents=True, exist_ok=True)
    config = MetricsConfig(run_name="<my & run>")
    out = Metrics(config, folder, 0, 100, info={"world_size": 2} | info, console=Console(file=io.StringIO()))
    out.expect(Expectation(tokens_per_second_per_gpu=1250.0, flops_per_token=1e6, peak_flops=1e10))
    out.describe({} if dense else {"3": 8, "5": 8}, {"version": {"torch": "2.11.0"}})
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
                idle_experts=None if dense else 0,
                layers=None if dense else LayerLoads([1.5, 1.0 + step / 10], [0.5, 0.5], [0, 1], [0.9, 0.9]),
                memory=Memory(2**30, 3 * 2**30, step * 2**30, 80 * 2**30),
                rank_seconds=[0.2, 0.3, 0.21],
            )
        )
    out.event("checkpoint", steps, seconds=1.25)
    out.close()


class Tables(HTMLParser):
    """Tables of a page by caption, each a mapping from a row's name to its cells; and what the page would load."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.tables: dict[str, dict[str, list[str]]] = {}
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self._inside = ""
        self._row: list[str] = []
        self._caption = ""
        self.feed(page.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "caption":
            self._caption = ""
        if tag == "tr":
            self._row = []
        if tag in ("th", "td"):
            self._row.append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == "caption":
            self.tables[self._caption] = {}
        if tag == "tr":
            self.tables[self._caption][self._row[0]] = self._row[1:]
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "caption":
            self._caption += data
        if self._inside in ("th", "td"):
            self._row[-1] += data

    def summary(self) -> dict[str, str]:
        return {name: cells[0] for name, cells in self.tables["Summary"].items()}


def test_summary_and_pictures(tmp_path: Path) -> None:
    write_run(tmp_path, 50, [(0, 8.25), (25, 5.0), (50, 4.0)], vocab_size=4096)
    (tmp_path / "config.yaml").write_text("optim:\n  lr: 0.001  # <fast>\n")
    files = report([tmp_path])
    assert files == [tmp_path / name for name in ("report.html", "run.png", "balance.png")]
    page = Tables(files[0])
    rows = page.summary()
    assert rows["steps"] == "50 of 100"
    assert rows["label tokens"] == "50,000"
    assert rows["speed"] == "2,000 tokens/s (median)"
    assert rows["ranks"] == "2, 1,000 tokens/s each"
    assert rows["MFU"].startswith("10.0 %")
    assert rows["time in steps"] == "26 s"
    assert rows["memory, rank 0"] == "50.0 GiB at its peak"
    assert rows["validation loss"] == "8.250 at first, 4.000 at last, -4.250 nats"
    assert rows["ln(vocabulary)"].startswith(f"{math.log(4096):.3f} for 4,096 entries")
    assert rows["steps without a finite loss"] == "1"
    assert page.tables["Versions"] == {"torch": ["2.11.0"]}
    assert page.tables["Slowest rank by own computation"]["rank 1"] == ["50 of 50", "+42.9 %"]
    assert page.tables["Balance of the worst layers"]["5"] == ["3.55", "6"]
    assert ["50", "checkpoint: 1.25 s"] in page.tables["Events"].values()
    phases = page.tables["Phases of the time"]
    assert sum(float(cells[0].removesuffix(" %")) for name, cells in phases.items() if name != "phase") == (
        pytest.approx(100, abs=0.5)
    )
    text = files[0].read_text()
    assert "lr: 0.001  # &lt;fast&gt;" in text
    assert "&lt;my &amp; run&gt;" in text and "<my" not in text
    assert "80.0 % of the 1,250 planned" in text
    for picture in files[1:]:
        assert Image.open(picture).size[0] >= 1200


@pytest.mark.filterwarnings("error")
def test_a_folder_whose_name_the_font_lacks(tmp_path: Path) -> None:
    write_run(tmp_path / "\u65e5\u672c", 3, [(0, 8.25)])
    rewrite = (tmp_path / "\u65e5\u672c" / "metrics.jsonl").read_text().replace("<my & run>", "\u65e5\u672c")
    (tmp_path / "\u65e5\u672c" / "metrics.jsonl").write_text(rewrite)
    assert len(report([tmp_path / "\u65e5\u672c"])) == 3


def test_what_files_say_is_never_markup(tmp_path: Path) -> None:
    """Also what no UTF-8 file can hold, in every place where a page shows a text of the run."""
    about = {"kind": "run", "run": EVIL, "data": {EVIL: [{"path": EVIL}]}, "torch": EVIL, "layers": [EVIL]}
    step = {"kind": "step", "step": 1, "loss": 1.0, "phase_seconds": {EVIL: 1.0}, "layers": {"max_over_mean": [2.0]}}
    event = {"kind": "event", "event": EVIL, EVIL: EVIL, "step": EVIL}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in (about, step, event)))
    (tmp_path / "config.yaml").write_text(f"# {EVIL}\n", encoding="utf-8", errors="replace")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    found = Tables(tmp_path / "report.html").tags
    assert not [tag for tag, attrs in found if tag == "script" or any(name.startswith("on") for name in attrs)]
    assert not [attrs for tag, attrs in found if tag == "img" and not attrs["src"].startswith("data:")]
    assert text.count("&lt;script&gt;") >= 8
    assert "\x1b" not in text


def test_page_needs_nothing_beside_itself(tmp_path: Path) -> None:
    write_run(tmp_path, 3, [(0, 8.25)])
    page = write_report(tmp_path)
    text = page.read_text()
    links = re.findall(r"(?:src|href|action|poster|srcset)=\"([^\"]{0,22})|url\(|@import", text)
    assert links and all(link.startswith(("data:image/png;base64,", "#")) for link in links)
    anchors = {link for link in links if link.startswith("#")}
    assert anchors <= {f"#{attrs['id']}" for _, attrs in Tables(page).tags if "id" in attrs}
    assert "default-src 'none'" in text


def test_every_curve_is_also_said_and_listed(tmp_path: Path) -> None:
    write_run(tmp_path, 30, [(0, 8.25), (30, 4.0)])
    tags = Tables(write_report(tmp_path)).tags
    ids = [attrs["id"] for _, attrs in tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    drawings = [attrs for tag, attrs in tags if tag == "svg" and attrs.get("aria-hidden") != "true"]
    assert len(drawings) >= 9
    for attrs in drawings:
        assert attrs["role"] == "img" and set(attrs["aria-labelledby"].split()) <= set(ids)
    scrolling = [attrs for _, attrs in tags if "scroll" in (attrs.get("class") or "").split()]
    assert scrolling and all(attrs["tabindex"] == "0" and attrs["aria-label"] for attrs in scrolling)


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
    rows = Tables(write_report(tmp_path)).summary()
    assert ("steps" in rows) == (steps > 0)
    assert ("validation loss" in rows) == bool(evals)
    assert ("expert load" in rows) == (steps > 0 and not dense)
    assert (tmp_path / "balance.png").exists() == (steps > 0 and not dense)
    assert Image.open(tmp_path / "run.png").size[0] >= 1200


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([], "none written: it goes on, failed, or was killed"),
        ([{"event": "stop", "signal": "SIGTERM"}, {"event": "checkpoint"}], "stopped by SIGTERM"),
        ([{"event": "stop", "signal": "time limit"}, {"event": "done"}], "stopped by time limit"),
        ([{"event": "nonfinite", "step": 4}], "step 4 was not finite"),
        ([{"event": "done"}], "done"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_how_a_run_ended(tmp_path: Path, events: list[dict[str, Any]], words: str) -> None:
    before = [{"kind": "run", "time": 1.0, "total_steps": 9}, {"kind": "event", "time": 2.0, "event": "nonfinite"}]
    start, step = {"kind": "run", "time": 3.0, "total_steps": 9}, {"kind": "step", "step": 1, "loss": 1.0, "time": 4.0}
    records = [*before, start, step, *({"kind": "event", "time": 5.0} | event for event in events)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert Tables(report([tmp_path])[0]).summary()["end"] == words


def test_files_of_earlier_versions(tmp_path: Path) -> None:
    steps = [
        {"kind": "step", "step": s, "loss": 3.0, "grad_norm": 1.0, "lr": 1e-3, "tokens": 10, "tokens_per_second": 5.0,
         "step_seconds": 2.0, "memory_bytes": 2**30, "expert_load_max_over_mean": 2.0}
        for s in (1, 2)
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in steps))
    rows = Tables(write_report(tmp_path)).summary()
    assert rows["steps"] == "2" and rows["speed"] == "5 tokens/s (median)"


def test_torn_lines_and_steps_made_twice(tmp_path: Path) -> None:
    write_run(tmp_path, 3, [])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "step", "step": 3, "loss": 7.0}\n{"kind": "step", "step": "x"}\n[1]\n{"kind": "step", "lo')
    rows = Tables(write_report(tmp_path)).summary()
    assert rows["steps"] == "3 of 100"
    assert rows["training loss"].endswith("7.000 at last")


def test_vocabulary_from_the_exported_model(tmp_path: Path) -> None:
    write_run(tmp_path, 1, [])
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"text_config": {"vocab_size": 512}}')
    assert "512 entries" in Tables(write_report(tmp_path)).summary()["ln(vocabulary)"]


def test_no_run_here(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no metrics\.jsonl in .*: name the output_dir of a run"):
        write_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "run"}\n')
    with pytest.raises(ValueError, match="holds no step yet"):
        write_report(tmp_path)
    with pytest.raises(ValueError, match=r"ends in \.html"):
        report([tmp_path], "page.pdf")


def test_comparison(tmp_path: Path) -> None:
    for name, lr in (("a", 1e-3), ("b", 1e-4)):
        write_run(tmp_path / name, 25, [(0, 8.0), (25, 4.0)])
        (tmp_path / name / "config.yaml").write_text(f"optim:\n  lr: {lr}\n  betas: [0.9, 0.95]\n")
    files = report([tmp_path / "a", tmp_path / "b"], tmp_path / "out" / "both.html")
    assert files == [tmp_path / "out" / "both.html", tmp_path / "out" / "both.png"]
    page = Tables(files[0])
    found = page.tables["What the configurations do not have in common"]
    assert list(found.values())[1:] == [["0.001", "0.0001"]]
    # both are called the same, so the folders tell them apart
    assert [name.partition(" (")[0] for name in page.tables["Summary"][""]] == ["<my & run>"] * 2
    assert len(set(page.tables["Summary"][""])) == 2
    assert page.tables["Summary"]["steps"] == ["25 of 100", "25 of 100"]
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))


def test_differences_of_nested_settings() -> None:
    first = "a: {b: 1, c: [1, 2]}\nd: [{p: x}, {p: y}]\n"
    second = "a: {b: 1, c: [1, 3]}\nd: [{p: x}]\ne: null\n"
    assert differences([first, second]) == [
        ("a.c", ["[1, 2]", "[1, 3]"]),
        ("d.1.p", ["y", "(not there)"]),
        ("e", ["(not there)", "null"]),
    ]
    assert differences([first, first]) == []
    assert differences(["a: [", "b: 1"]) == [("b", ["(not there)", "1"])]


def test_a_hundred_thousand_steps(tmp_path: Path) -> None:
    """Small, and the one extreme value of each curve is there."""
    rng = random.Random(0)
    names = [str(layer) for layer in range(16)]
    with (tmp_path / "metrics.jsonl").open("w") as file:
        about = {"kind": "run", "run": "long", "total_steps": 100_000, "layers": names}
        file.write(json.dumps(about) + "\n")
        for step in range(1, 100_001):
            record = {
                "kind": "step", "step": step, "loss": 2 + rng.random() + 9 * (step == 77_777), "grad_norm": 1.0,
                "lr": 1e-3, "tokens_per_second": 100.0 + rng.random() - 90 * (step == 5_001), "step_seconds": 0.1,
                "tokens": 10, "memory_bytes": 2**30, "phase_seconds": {"forward_backward": 0.09, "other": 0.01},
            }  # fmt: skip
            if step % 100 == 0:
                record["layers"] = {
                    "max_over_mean": [1 + rng.random() + 5 * (step == 50_000 == 5_000 * int(n)) for n in names]
                }
            file.write(json.dumps(record) + "\n")
    page = write_report(tmp_path)
    assert page.stat().st_size < 2e6
    text = page.read_text()
    assert re.search(r"highest 1[12]\.\d+ at step 77,777", text)
    assert re.search(r"lowest 10\.\d+ at step 5,001", text)
    assert "in layer 10" in text


def test_extremes_survive_and_gaps_stay() -> None:
    rng = np.random.default_rng(0)
    x, y = np.arange(10_000.0), rng.normal(size=10_000)
    y[1234], y[8765] = 50.0, -50.0
    y[4000:5000] = np.nan
    lines = envelope(x, y, buckets=100)
    points = [point for line in lines for point in line]
    assert (1234.0, 50.0) in points and (8765.0, -50.0) in points
    assert len(points) <= 200 and points == sorted(points)
    assert len(lines) == 2 and lines[0][-1][0] < 4000 and lines[1][0][0] >= 5000
    few = envelope(np.arange(6.0), np.array([1.0, np.nan, 3.0, 4.0, np.nan, np.nan]))
    assert few == [[(0.0, 1.0)], [(2.0, 3.0), (3.0, 4.0)]]
    assert envelope(x[:3], np.full(3, np.nan)) == []


def test_worst_of_layers() -> None:
    values_SL = np.full((10, 2), np.nan, dtype=np.float32)
    values_SL[:, 0] = np.arange(10)
    values_SL[7, 1] = 3.0
    cells_LB = worst(values_SL, 5)
    assert cells_LB[0].tolist() == [1, 3, 5, 7, 9]
    assert cells_LB[1, 3] == 3 and np.isnan(cells_LB[1, [0, 1, 2, 4]]).all()


def test_smoothing_follows_a_line_and_passes_gaps() -> None:
    line = np.array([10.0 - 0.1 * i for i in range(100)])
    assert smooth(line)[:98] == pytest.approx(line[:98])
    assert smooth(np.array([1.0, math.nan, 3.0, 5.0, 7.0]))[1] == pytest.approx(2.0)
    assert math.isnan(smooth(np.array([math.nan]))[0])
    assert len(smooth(np.array([]))) == 0


@pytest.mark.parametrize("values", [[3.0], [0.0], [-2.0, 5.0], [1e-6, 2e-6], [1.0] * 50 + [1e6], [math.nan]])
@pytest.mark.parametrize("zero", [False, True])
def test_scales_hold_all_values_and_have_round_marks(values: list[float], zero: bool) -> None:
    scale = scale_for(np.array(values), zero=zero)
    known = [value for value in values if math.isfinite(value)]
    assert all(0 <= scale.place(value) <= 1 for value in known)
    marks = ticks(scale)
    assert 2 <= len(marks) <= 12 and all(scale.low <= mark <= scale.high for mark in marks)
    assert all(len(short(mark)) <= 8 for mark in marks)
    assert scale.log == (max(known, default=0) == 1e6)


def test_marks_of_an_axis() -> None:
    assert ticks(Scale(0, 100)) == [0, 20, 40, 60, 80, 100]
    assert ticks(Scale(0.9, 11_000, log=True)) == [1, 10, 100, 1000, 10_000]
    assert [short(mark) for mark in (0, 0.25, 1500, 25_000, 1.5e6)] == ["0", "0.25", "1500", "25k", "1.5M"]


def test_words_of_a_curve() -> None:
    x = np.array([1, 2, 3, 4])
    words = reading(Line("Loss", x, np.array([4.0, math.nan, 1.0, 2.0]), 0))
    assert words == (
        "Loss: 4 at step 1, 2 at step 4; lowest 1 at step 3, highest 4 at step 1; 1 without a finite value."
    )


def test_durations() -> None:
    assert [duration(s) for s in (48.2, 185, 7620, 273_600, math.nan)] == [
        "48 s", "3 min 05 s", "2 h 07 min", "3 d 04 h", "-",
    ]  # fmt: skip


def luminance(color: str) -> float:
    """Relative luminance of WCAG 2.2."""
    channels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=["light", "dark"])
def test_contrast(theme: dict[str, str]) -> None:
    """4.5 for text and 3 for what is drawn (WCAG 2.2, 1.4.3 and 1.4.11), on the page and on its cards."""
    for name, color in theme.items():
        least = 4.5 if name in ("ink", "muted", "link", "bad") else 3.0 if re.fullmatch(r"c\d", name) else 1.0
        for ground in ("page", "card"):
            one, other = sorted((luminance(color), luminance(theme[ground])))
            assert (other + 0.05) / (one + 0.05) >= least, f"{name} on {ground}"


def test_runs_of_one_name_and_folder_are_told_apart(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 2, [])
    page = Tables(write_comparison([tmp_path / "a", tmp_path / "a", tmp_path / "a"], tmp_path / "c.html"))
    assert len(set(page.tables["Summary"][""])) == 3
