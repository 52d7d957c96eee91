"""What the documents promise exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from moetrain.families import decorated_families
from tests.families import FAMILIES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", ["README.md", "docs/families.md"])
def test_the_table_of_families_is_complete(page: str) -> None:
    rows = re.findall(r"^\| (\w+)(?: \((\w+)\))? \|", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    listed = {f"{name}+{variant}" if variant else name for name, variant in rows if name != "family"}
    assert set(FAMILIES) <= listed
    assert set(decorated_families().causal_lm) <= {name.partition("+")[0] for name in listed}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_modules_and_make_targets_exist(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for module in set(re.findall(r"-m ((?:moetrain|tests)[\w.]*)", text)):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for target in set(re.findall(r"`make ([a-z-]+)", text)):
        assert target in targets, target
