"""Draw dashboards without a Grafana: their JSON and a Prometheus' answers become one offline HTML page each.

    python -m monitoring.dashboards.render --prometheus http://127.0.0.1:9090 --run my-run --out pictures

An approximation for documentation and tests: what is asked, its units, thresholds, legends and empty states are as in
the JSON; the drawing is this module's own. With `--png` Chromium turns the pages into pictures.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from monitoring.dashboards import JSON
from monitoring.dashboards.drawing import panels
from monitoring.dashboards.drawing.answers import Prometheus, View, choose, transform
from monitoring.dashboards.drawing.axes import Area, Mark
from monitoring.dashboards.drawing.tiles import nothing
from monitoring.dashboards.drawing.values import COLORS

WIDTH = 1600
ROW = 38
"""Height of a unit of the grid with the gap below it, pixels, as in Grafana."""
GAP = 8
HEAD = 96
"""Height of the title and the variables above the panels."""
STYLE = """
body{background:#111217;color:#ccccdc;font:13px Inter,Roboto,'DejaVu Sans',sans-serif;margin:0;padding:10px 14px}
h1{font-size:20px;margin:4px 0 8px;font-weight:500} h1 small{font-size:12px;color:#8e8e9a;margin-left:12px}
.var{display:inline-block;border:1px solid #2c3035;border-radius:2px;padding:4px 8px;margin-right:8px;font-size:12px}
.var b{color:#6e9fff;font-weight:500;margin-right:8px}
.var i{display:inline-block;width:9px;height:9px;margin-right:5px}
#grid{position:relative} .panel{position:absolute;background:#181b1f;border:1px solid #25272c;border-radius:2px;
box-sizing:border-box;padding:6px 8px;overflow:hidden} .panel h3{font-size:13px;font-weight:500;margin:0 0 4px;
white-space:nowrap;overflow:hidden;text-overflow:ellipsis} .row{position:absolute;font-size:15px;font-weight:500;
line-height:30px;left:0;right:0} .empty{display:flex;align-items:center;justify-content:center;color:#8e8e9a;
text-align:center} .tiles{display:flex} .tile{flex:1;display:flex;flex-direction:column;align-items:center;
justify-content:center;position:relative;font-weight:500;line-height:1.2}
.name{font-size:12px;color:#ccccdc}
.over{padding-bottom:34px;box-sizing:border-box}
.spark{position:absolute;left:0;bottom:0} svg text{font-size:11px} .legend{overflow:hidden;font-size:12px}
.key{margin-right:12px;white-space:nowrap} .key i{display:inline-block;width:14px;height:4px;border-radius:2px;
margin-right:5px;vertical-align:middle} .beside{display:flex} .legend.right .key{display:block;line-height:17px}
table{border-collapse:collapse;width:100%;font-size:12px} th{color:#6e9fff;text-align:left;font-weight:500}
th,td{border-bottom:1px solid #25272c;padding:0 8px;height:35px;white-space:nowrap;overflow:hidden;
text-overflow:ellipsis}
.bar{display:flex;align-items:center;font-size:12px} .bar b{flex:1;background:#22252b;height:70%}
.bar b i{display:block;height:100%} .bar em{width:80px;text-align:right;font-style:normal;font-weight:500}
"""


def page(model: Mapping[str, Any], view: View) -> str:
    """One dashboard as HTML that loads nothing.

    Raises:
        ValueError: a query that Prometheus rejects, or a unit, transformation or panel type that is not known here.
    """
    marks: list[Mark] = []
    for annotation in model["annotations"]["list"]:
        marks += [(start, end, annotation["iconColor"]) for start, end in view.events(annotation)]
    drawn = [_panel(panel, view, marks) for panel in model["panels"]]
    bottom = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in model["panels"])
    shown = " to ".join(time.strftime("%Y-%m-%d %H:%M", time.gmtime(at)) for at in (view.start, view.end))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(model["title"])}</title>'
        f"<style>{STYLE}</style><h1>{escape(model['title'])}<small>{shown} UTC; drawn by "
        f"monitoring.dashboards.render, not by Grafana</small></h1>{_choices(model, view)}"
        f'<div id="grid" style="height:{bottom * ROW}px">{"".join(drawn)}</div></html>'
    )


def _choices(model: Mapping[str, Any], view: View) -> str:
    """The variables with their values, and the annotations with their colours."""
    items = []
    for variable in model["templating"]["list"]:
        chosen = view.variables[variable["name"]]
        text = "All" if variable.get("includeAll") and chosen.startswith(("(", ".")) else chosen
        items.append(f'<span class="var"><b>{escape(variable["label"])}</b>{escape(text)}</span>')
    for annotation in model["annotations"]["list"]:
        shade = COLORS[annotation["iconColor"]]
        items.append(f'<span class="var"><i style="background:{shade}"></i>{escape(annotation["name"])}</span>')
    return f'<div style="height:36px">{"".join(items)}</div>'


def _panel(panel: Mapping[str, Any], view: View, marks: Sequence[Mark]) -> str:
    place = panel["gridPos"]
    column = (WIDTH - 28) / 24
    left, top = place["x"] * column, place["y"] * ROW
    title = escape(view.fill(panel["title"]))
    if panel["type"] == "row":
        return f'<div class="row" style="top:{top}px">&#8964; {title}</div>'
    width, height = place["w"] * column - GAP, place["h"] * ROW - GAP
    box = f"left:{left:.0f}px;top:{top}px;width:{width:.0f}px;height:{height}px"
    hint = escape(panel["description"], quote=True)
    area = Area(width - 18, height - 38, view.times, marks)
    return f'<div class="panel" style="{box}" title="{hint}"><h3>{title}</h3>{_contents(panel, view, area)}</div>'


def _contents(panel: Mapping[str, Any], view: View, area: Area) -> str:
    targets = panel["targets"]
    if panel["type"] in panels.OF_FRAMES:
        frames = [view.frame(target, alone=len(targets) == 1) for target in targets]
        frame = transform(frames, panel["transformations"])
        return panels.OF_FRAMES[panel["type"]](panel, frame, area) if len(frame) else nothing(panel, area)
    series = [one for target in targets for one in view.series(target)]
    return panels.DRAWN[panel["type"]](panel, series, area) if series else nothing(panel, area)


def screenshot(html: Path, png: Path) -> None:
    """A picture of a page by headless Chromium, as high as the page.

    Raises:
        ValueError: no Chromium is installed.
    """
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        raise ValueError("--png needs chromium; on Debian: apt install chromium")
    bottom = int(html.read_text(encoding="utf-8").split('id="grid" style="height:')[1].split("px")[0])
    with tempfile.TemporaryDirectory() as profile:
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
        size = f"--window-size={WIDTH},{bottom + HEAD}"
        command = [browser, *flags, f"--user-data-dir={profile}", size, f"--screenshot={png}", html.resolve().as_uri()]
        subprocess.run(command, check=True, capture_output=True, timeout=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw the dashboards from a Prometheus, without a Grafana.")
    parser.add_argument(
        "names", nargs="*", metavar="dashboard", help="such as run-at-a-glance; all of them if left out"
    )
    parser.add_argument("--prometheus", default="http://127.0.0.1:9090", help="its address")
    parser.add_argument("--run", help="name of the run; the first one known if left out")
    parser.add_argument("--layer", help="MoE layer for the panels of one layer")
    parser.add_argument("--minutes", type=float, default=60, help="length of the time range")
    parser.add_argument("--end", type=float, help="its end in Unix seconds; now if left out")
    parser.add_argument("--out", type=Path, default=Path("dashboards"), help="folder for the pages")
    parser.add_argument("--png", action="store_true", help="pictures too, by Chromium")
    asked = parser.parse_args(arguments)
    prometheus = Prometheus(asked.prometheus)
    end = asked.end or time.time()
    start = end - asked.minutes * 60
    asked.out.mkdir(parents=True, exist_ok=True)
    for name in asked.names or sorted(path.stem for path in JSON.glob("*.json")):
        model = json.loads((JSON / f"{name}.json").read_text(encoding="utf-8"))
        chosen = {key: text for key in ("run", "layer") if (text := getattr(asked, key))}
        if name == "all-runs":
            chosen.pop("run", None)
        variables = choose(model, prometheus, start, end, **chosen)
        html = asked.out / f"{name}.html"
        html.write_text(page(model, View(prometheus, start, end, (end - start) / 240, variables)), encoding="utf-8")
        print(html)
        if asked.png:
            screenshot(html, html.with_suffix(".png"))


if __name__ == "__main__":
    main()
