"""Run the parity matrix and write the table of supported families into README.md and docs/families.md.

    python -m tests.parity_table            the layouts of 2 and 4 ranks
    python -m tests.parity_table --all      also those of 8

A figure is the largest difference from plain eager Transformers over loss, logits, gradients and gradient norm,
relative to the largest reference value, in fp32.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from moetrain.families import UNSUPPORTED, decorated_families
from tests.dist.test_parity import LAYOUTS, SOME, TOLERANCE, world_of
from tests.families import FAMILIES
from tests.parity import Parity, parity_of_families
from tests.ranks import run_ranks

BEGIN, END = "<!-- parity table: made by `python -m tests.parity_table` -->", "<!-- end of the parity table -->"
ROOT = Path(__file__).parent.parent


def worst(result: Parity) -> str:
    """The figure of a cell, or what is wrong."""
    if result.error is not None:
        return "error"
    if result.missing_gradients or not (result.same_keys and result.same_weights):
        return "differs"
    value = max(result.loss, result.logits, result.gradients, result.norm)
    return f"{value:.0e}" if value < TOLERANCE else f"**{value:.0e}**"


def table(results: dict[str, dict[str, Parity]]) -> str:
    """Markdown: a row for each family, a column for each layout."""
    classes = decorated_families().causal_lm
    lines = [
        f"| family | class | {' | '.join(results)} |",
        f"|---|---|{'---|' * len(results)}",
    ]
    for family in sorted(FAMILIES):
        model_type, _, variant = family.partition("+")
        name = f"{model_type} ({variant})" if variant else model_type
        cells = [worst(layout[family]) if family in layout else "" for layout in results.values()]
        lines.append(f"| {name} | `{classes[model_type]}` | {' | '.join(cells)} |")
    lines += [f"| {family} | not supported: {reason} | {'| ' * len(results)}" for family, reason in UNSUPPORTED.items()]
    return "\n".join(lines)


def write(text: str, files: Iterable[Path]) -> None:
    for file in files:
        before, _, rest = file.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        file.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def main() -> None:
    results = {}
    for name, (layout, families) in LAYOUTS.items():
        if world_of(layout) > 4 and "--all" not in sys.argv:
            continue
        with tempfile.TemporaryDirectory() as folder:
            ranks = run_ranks(parity_of_families, world_of(layout), families, layout, folder, timeout=3000)
        results[name] = ranks[0]
        print(name, "failed:", [family for family, result in ranks[0].items() if not worst(result)[0].isdigit()])
    full = {name: layout for name, layout in results.items() if len(layout) > len(SOME)}
    write(table(results), [ROOT / "docs" / "families.md"])
    write(table(full), [ROOT / "README.md"])


if __name__ == "__main__":
    main()
