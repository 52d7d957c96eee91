"""Colours and the style sheet of the page."""

from __future__ import annotations

SLOTS = 8
"""Colours of curves and phases; beyond them colours repeat with another dash."""
DASHES = ("none", "7 4", "2 3", "10 3 2 3")

LIGHT = {
    "page": "#ffffff", "card": "#f6f8fa", "ink": "#1f2328", "muted": "#57606a", "grid": "#d8dee4", "edge": "#c4ccd4",
    "link": "#0550ae", "bad": "#b3261e",
    "c0": "#1f6feb", "c1": "#bc4c00", "c2": "#1a7f37", "c3": "#8250df",
    "c4": "#bf3989", "c5": "#0b7285", "c6": "#7d4e00", "c7": "#57606a",
}  # fmt: skip
DARK = {
    "page": "#0d1117", "card": "#161b22", "ink": "#e6edf3", "muted": "#9da7b1", "grid": "#2a313a", "edge": "#3d444d",
    "link": "#79c0ff", "bad": "#ff8a80",
    "c0": "#58a6ff", "c1": "#ffa657", "c2": "#3fb950", "c3": "#bc8cff",
    "c4": "#f778ba", "c5": "#39c5cf", "c6": "#e3b341", "c7": "#9da7b1",
}  # fmt: skip


def _variables(colors: dict[str, str]) -> str:
    return " ".join(f"--{name}: {color};" for name, color in colors.items())


_SLOT_RULES = "\n".join(
    f".s{slot} {{ --line: var(--c{slot % SLOTS}); --dash: {DASHES[slot // SLOTS % len(DASHES)]}; }}"
    for slot in range(SLOTS * len(DASHES))
)

CSS = (
    f"""
:root {{ color-scheme: light; {_variables(LIGHT)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ color-scheme: dark; {_variables(DARK)} }} }}
{_SLOT_RULES}
"""
    + """
* { box-sizing: border-box; }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 0;
  overflow-wrap: anywhere; }
header, nav, main, footer { max-width: 76rem; margin: 0 auto; padding: 0 1rem; }
header { padding-top: 1.25rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0 0 .25rem; }
h2 { font-size: 1.25rem; margin: 2.25rem 0 .75rem; border-bottom: 1px solid var(--edge); padding-bottom: .25rem; }
h3 { font-size: 1rem; margin: 0; }
p { margin: .35rem 0; }
section > figure, section > .scroll { margin-top: .9rem; }
a { color: var(--link); }
.muted, figcaption span, caption { color: var(--muted); }
.bad { color: var(--bad); font-weight: 600; }
.skip { position: absolute; left: -999rem; }
.skip:focus { position: static; display: inline-block; margin: .5rem 1rem; padding: .35rem .75rem; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; border-radius: 3px; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .75rem 0 0; padding: 0; }
nav a { display: inline-block; padding: .35rem 0; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 9rem), 1fr)); gap: .75rem;
  margin: 1rem 0; }
.tiles > div { background: var(--card); border: 1px solid var(--grid); border-radius: .5rem; padding: .6rem .8rem; }
.tiles dt { color: var(--muted); font-size: .85rem; }
.tiles dd { margin: 0; font-size: 1.3rem; font-weight: 600; font-variant-numeric: tabular-nums; line-height: 1.3; }
.tiles dd + dd { font-size: .85rem; font-weight: 400; color: var(--muted); }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 30rem), 1fr)); gap: 1rem; }
.wide { grid-column: 1 / -1; }
figure { margin: 0; background: var(--card); border: 1px solid var(--grid); border-radius: .5rem;
  padding: .8rem .9rem; min-width: 0; }
figcaption h3 { display: inline; margin-right: .5rem; }
figcaption span { font-size: .9rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: .3rem 0 0; padding: 0;
  font-size: .9rem; }
.legend svg { width: 1.8rem; height: .7rem; margin-right: .4rem; }
.plot { position: relative; margin: .6rem 0 1.6rem 3.6rem; height: 14rem; }
.wide .plot { height: 19rem; }
.heat .plot { height: auto; }
.plot svg, .plot img { display: block; width: 100%; height: 100%; }
.plot img { image-rendering: pixelated; }
.plot svg { overflow: visible; border-left: 1px solid var(--edge); border-bottom: 1px solid var(--edge); }
.plot span { position: absolute; font-size: .75rem; color: var(--muted); font-variant-numeric: tabular-nums;
  white-space: nowrap; line-height: 1; overflow-wrap: normal; }
.plot .y { right: calc(100% + .4rem); transform: translateY(50%); }
.plot .x { top: calc(100% + .4rem); transform: translateX(-50%); }
.plot .x.last { transform: translateX(-100%); }
.plot .level { right: .3rem; transform: translateY(-.15rem); background: var(--card); padding: 0 .15rem; }
.axis { font-size: .8rem; color: var(--muted); text-align: right; margin: -.2rem 0 0; }
svg path { fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; }
.gridline { stroke: var(--grid); stroke-width: 1; }
.levelline { stroke: var(--muted); stroke-width: 1.5; stroke-dasharray: 4 4; }
.restart { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 1 3; }
.lost { stroke: var(--bad); stroke-width: 7; stroke-linecap: round; }
.line { stroke: var(--line); stroke-width: 2; stroke-dasharray: var(--dash); }
.faint { stroke: var(--line); stroke-width: 1; opacity: .55; }
.dots { stroke: var(--line); stroke-width: 8; stroke-linecap: round; }
svg path.area { fill: var(--line); stroke: var(--card); stroke-width: 1; }
.reading { font-size: .9rem; }
.swatch { display: inline-block; width: .8rem; height: .8rem; border-radius: .15rem; background: var(--line);
  margin-right: .4rem; }
.ramp { display: flex; align-items: center; gap: .5rem; font-size: .85rem; color: var(--muted); }
.ramp img { height: .8rem; width: 10rem; }
.scroll { overflow-x: auto; max-width: 100%; position: relative; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .95rem; }
caption { text-align: left; padding-bottom: .25rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem 1.25rem .25rem 0; border-bottom: 1px solid var(--grid);
  overflow-wrap: normal; }
th[scope=row] { font-weight: 400; color: var(--muted); }
thead th, th[scope=col] { font-weight: 600; }
td { max-width: 40rem; overflow-wrap: anywhere; min-width: 4.5rem; }
.short { white-space: nowrap; }
details { margin: .5rem 0; }
summary { cursor: pointer; padding: .25rem 0; color: var(--link); }
pre { background: var(--card); border: 1px solid var(--grid); border-radius: .5rem; padding: .8rem; margin: .5rem 0;
  font: 13px/1.45 ui-monospace, monospace; overflow-wrap: normal; }
footer { padding-bottom: 2rem; margin-top: 2rem; font-size: .9rem; }
@media print {
  nav, .skip { display: none; }
  figure, .tiles > div { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  .scroll { overflow: visible; }
  pre { white-space: pre-wrap; }
  * { print-color-adjust: exact; }
}
"""
)
