"""The report's page in a real browser: light and dark, wide and narrow, by keyboard, without a network."""

from __future__ import annotations

import json
import math
import os
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from moetrain.report import write_comparison, write_report
from moetrain.report.style import DARK, LIGHT
from tests.browser import Page, browser, find_chromium

pytestmark = pytest.mark.skipif(find_chromium() is None, reason="no chromium to show the page in")

WIDTHS = (320, 360, 768, 1280)
PICTURES = os.environ.get("MOETRAIN_PICTURES")
"""A folder: the pictures of docs/ are written there."""
PHASES = {"forward_backward": 0.18, "optimizer": 0.03, "collective_wait": 0.05, "data_wait": 0.004, "other": 0.006}


def write_run(folder: Path, seed: int, steps: int = 400, layers: int = 24, lr: float = 3e-4) -> None:
    """What a run on 8 GPUs would write, with a spike, a restart, a layer out of balance and a slow rank."""
    rng, now = random.Random(seed), 1_795_000_000.0
    about = {
        "kind": "run", "run": folder.name, "total_steps": steps, "start_step": 0, "vocab_size": 151_936,
        "world_size": 8, "layers": [str(i) for i in range(layers)], "expected_tokens_per_second_per_gpu": 15_500.0,
        "flops_per_token": 2.1e10, "peak_flops": 9.89e14, "model_type": "qwen3_moe", "ep_size": 8,
        "gate": "learned", "torch": "2.11.0", "transformers": "5.23.0", "cuda": "13.0", "triton": "3.6.0",
        "data": {"train": {"documents": 716, "tokens": 3_463_236}, "sources": [{"path": "corpus/" + "long-name-" * 9}]},
    }  # fmt: skip
    records = [about | {"time": now}]
    for step in range(1, steps + 1):
        late = step > 0.6 * steps
        if step == steps // 2:
            records.append(about | {"time": now, "start_step": step})
            records.append({"kind": "event", "event": "restart", "step": step, "restarts": 1, "time": now})
        seconds = 0.265 * (1 + abs(rng.gauss(0, 0.03))) + 30 * (step == 1)
        loads = [1 + abs(rng.gauss(0.35, 0.08)) * (1 + math.exp(-step / (0.2 * steps))) for _ in range(layers)]
        loads[7] += 2.5 * late
        loss = 2 + 6 * math.exp(-step / (0.15 * steps)) + rng.gauss(0, 0.07) + 1.5 * (step == int(0.7 * steps))
        phases = {name: share * seconds / 0.27 for name, share in PHASES.items()}
        phases |= {"evaluate": 3.0 * (step % 50 == 0), "checkpoint": 6.0 * (step % 100 == 0)}
        now += seconds + phases["evaluate"] + phases["checkpoint"]
        records.append({
            "kind": "step", "time": round(now, 3), "step": step, "loss": None if step == 320 else loss,
            "grad_norm": abs(rng.gauss(1, 0.2)) * (30 if step == int(0.7 * steps) else 1),
            "lr": lr * min(1.0, step / 40) * (1 - 0.9 * step / steps), "tokens": 32_000,
            "tokens_per_second": 8 * 4096 / seconds, "step_seconds": seconds, "memory_bytes": int(63.2 * 2**30),
            "memory_reserved_bytes": int(70.5 * 2**30), "memory_total_bytes": int(79.2 * 2**30),
            "expert_load_max_over_mean": max(loads), "idle_experts": 3 * late, "load_entropy": 0.95,
            "layers": {"max_over_mean": loads, "idle_experts": [3 * (late and i == 7) for i in range(layers)]},
            "slow_ranks": [{"rank": 3 if step % 9 else 5, "seconds": 0.23}], "median_rank_seconds": 0.2,
            "phase_seconds": phases,
        })  # fmt: skip
        if step % 50 == 0:
            records.append({"kind": "eval", "time": now, "step": step, "loss": loss + 0.1, "tokens": 16_000})
        if step % 100 == 0:
            records.append({"kind": "event", "event": "checkpoint", "step": step, "seconds": 6.0, "time": now})
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "config.yaml").write_text(f"output_dir: runs/{folder.name}\noptim:\n  lr: {lr}\n# {'long ' * 60}\n")


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    write_run(folder / "qwen3-30b-a3b", seed=0)
    write_run(folder / "qwen3-30b-a3b-lr1e-4", seed=1, steps=300, lr=1e-4)
    runs = [folder / "qwen3-30b-a3b", folder / "qwen3-30b-a3b-lr1e-4"]
    return {"report": write_report(runs[0]), "comparison": write_comparison(runs, folder / "comparison.html")}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("browser")) as opened:
        yield opened


@pytest.mark.parametrize("kind", ["report", "comparison"])
@pytest.mark.parametrize("width", WIDTHS)
def test_fits_any_screen_and_loads_nothing(page: Page, pages: dict[str, Path], kind: str, width: int) -> None:
    page.open(pages[kind], width=width)
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.requests() == []
    assert page.complaints() == []
    # what is wider than the screen scrolls inside its own frame, and none of the words of a figure leave it
    spilled = page.evaluate(
        "[...document.querySelectorAll('figure')].filter(f => [...f.querySelectorAll('.plot span, h3, li, p')]"
        ".some(e => e.getBoundingClientRect().right > f.getBoundingClientRect().right + 1"
        " || e.getBoundingClientRect().left < f.getBoundingClientRect().left - 1)).map(f => f.innerText.slice(0, 60))"
    )
    assert spilled == []


def test_labels_of_an_axis_do_not_touch(page: Page, pages: dict[str, Path]) -> None:
    for width in WIDTHS:
        page.open(pages["report"], width=width)
        touching = page.evaluate(
            "[...document.querySelectorAll('.plot')].flatMap(p => ['.x', '.y'].flatMap(axis => {"
            "const r = [...p.querySelectorAll('span' + axis)].map(e => e.getBoundingClientRect());"
            "return r.flatMap((a, i) => r.slice(i + 1).filter(b => a.left < b.right && b.left < a.right"
            " && a.top < b.bottom && b.top < a.bottom)) })).length"
        )
        assert touching == 0, width


@pytest.mark.parametrize(("dark", "theme"), [(False, LIGHT), (True, DARK)], ids=["light", "dark"])
def test_light_and_dark(page: Page, pages: dict[str, Path], tmp_path: Path, dark: bool, theme: dict[str, str]) -> None:
    page.open(pages["report"], dark=dark)
    page.screenshot(tmp_path / "page.png", whole=False)
    pixels = np.asarray(Image.open(tmp_path / "page.png").convert("RGB")).reshape(-1, 3)
    colors, counts = np.unique(pixels, axis=0, return_counts=True)
    seen = {"#" + bytes(color.tolist()).hex() for color in colors[counts > 20]}
    assert {theme[name] for name in ("page", "card", "ink")} <= seen
    other = LIGHT if dark else DARK
    assert not {other[name] for name in ("page", "card")} & seen


def test_text_stands_out_as_computed(page: Page, pages: dict[str, Path]) -> None:
    """No element has a colour for its text that is not one of the theme's, whose contrast another test computes."""
    for dark, theme in ((False, LIGHT), (True, DARK)):
        page.open(pages["report"], dark=dark)
        colors = page.evaluate(
            "[...new Set([...document.querySelectorAll('body *')].filter(e => e.innerText)"
            ".map(e => getComputedStyle(e).color))]"
        )
        allowed = {f"rgb({int(c[1:3], 16)}, {int(c[3:5], 16)}, {int(c[5:7], 16)})" for c in theme.values()}
        assert set(colors) <= allowed


def test_by_keyboard(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["report"], width=360)
    page.press("Tab")
    assert page.evaluate("document.activeElement.innerText") == "Skip to the summary"
    assert page.evaluate("document.activeElement.getBoundingClientRect().left >= 0")
    page.press("Enter")
    assert page.evaluate("document.activeElement.id") == "summary"
    seen = set()
    for _ in range(200):
        page.press("Tab")
        tag = page.evaluate("document.activeElement.tagName + '.' + document.activeElement.className")
        if tag == "BODY.":
            break
        seen.add(tag)
        outlined = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outlined == "solid", tag
    else:
        pytest.fail("the focus never leaves the page")
    assert {"DIV.scroll", "PRE.scroll", "SUMMARY."} <= seen


def test_what_a_screen_reader_is_told(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["report"])
    nodes = page.call("Accessibility.getFullAXTree")["nodes"]
    told = [(node.get("role", {}).get("value"), node.get("name", {}).get("value", "")) for node in nodes]
    images = [name for role, name in told if role in ("image", "img", "graphics-document")]
    assert any("Loss" in name and "lowest" in name for name in images)
    assert any("worst cell" in name for name in images)
    headings = [name for role, name in told if role == "heading"]
    assert headings[:3] == ["qwen3-30b-a3b", "Summary", "Curves"]
    assert "main" in dict(told) and "navigation" in dict(told)


def test_on_paper(page: Page, pages: dict[str, Path]) -> None:
    page.open(pages["report"], dark=True)
    paper = page.pdf()
    assert paper.startswith(b"%PDF") and len(paper) > 20_000
    page.call("Emulation.setEmulatedMedia", media="print", features=[{"name": "prefers-color-scheme", "value": "dark"}])
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("getComputedStyle(document.querySelector('nav')).display") == "none"


@pytest.mark.skipif(PICTURES is None, reason="MOETRAIN_PICTURES names no folder for the pictures of docs/")
def test_pictures_for_docs(page: Page, pages: dict[str, Path]) -> None:
    for name, kind, width, height, dark in (
        ("report-light", "report", 1280, 1180, False),
        ("report-dark", "report", 1280, 1180, True),
        ("report-phone", "report", 360, 1180, False),
        ("report-comparison", "comparison", 1280, 1180, False),
    ):
        page.open(pages[kind], width=width, height=height, dark=dark)
        if kind == "comparison":
            page.evaluate("document.querySelector('#differences-in-configuration').scrollIntoView()")
        target = Path(PICTURES) / f"{name}.png"
        page.screenshot(target, whole=False)
        Image.open(target).convert("P", palette=Image.Palette.ADAPTIVE, colors=255).save(target, optimize=True)
