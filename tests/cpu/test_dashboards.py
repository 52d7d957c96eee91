"""The dashboards' JSON: made by the code, understood by Grafana, and asking for series that exist."""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
import subprocess
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from grafana_foundation_sdk.cog import plugins
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import dashboard as grafana
from grafana_foundation_sdk.models import units

from moetrain.metrics import records
from moetrain.metrics.series import STATES, Series
from monitoring.dashboards import DASHBOARDS, JSON
from monitoring.dashboards.__main__ import text
from monitoring.dashboards.page import mended
from monitoring.dashboards.queries import PHASES
from monitoring.dashboards.style import TIMES
from monitoring.demo.hardware import NODE_METRICS, read_counters
from monitoring.stack import FOLDER
from tests.grafana_types import problems

MODELS: dict[str, dict[str, Any]] = {
    name: json.loads((JSON / f"{name}.json").read_text(encoding="utf-8")) for name in DASHBOARDS
}
PANELS = [(name, panel) for name, model in MODELS.items() for panel in model["panels"] if panel["type"] != "row"]
EXPRESSIONS = sorted(
    {target["expr"] for _, panel in PANELS for target in panel["targets"]}
    | {mark["expr"] for model in MODELS.values() for mark in model["annotations"]["list"]}
)
BUILT_IN = {"__rate_interval", "__interval", "__range", "__from", "__value", "__url_time_range"}
SCHEMAS = os.environ.get("GRAFANA_SCHEMAS")
each = pytest.mark.parametrize("name", DASHBOARDS)


KNOWN_UNITS = {value for key, value in vars(units).items() if isinstance(value, str) and not key.startswith("__")}


@each
def test_the_committed_json_is_generated(name: str) -> None:
    assert (JSON / f"{name}.json").read_text(encoding="utf-8") == text(DASHBOARDS[name]()), (
        "run `python -m monitoring.dashboards` and commit what it writes"
    )


def test_the_code_knows_the_phases_that_ranks_export() -> None:
    assert set(TIMES) == set(records.PHASES) and tuple(PHASES) == STATES


def test_no_other_json_is_provisioned() -> None:
    assert {path.stem for path in JSON.glob("*")} == DASHBOARDS.keys()


@each
def test_nothing_is_unknown_to_grafanas_types(name: str) -> None:
    """Read by the library's types and written again: a key or panel type that it does not know is lost on the way."""
    plugins.register_default_plugins()
    again = json.loads(json.dumps(grafana.Dashboard.from_json(MODELS[name]), cls=JSONEncoder))
    assert mended(again) == MODELS[name]


def parts(model: dict[str, Any]) -> list[tuple[str, str, Any]]:
    """A dashboard, and what its own type leaves open: the options of each panel's type, and its queries.

    Returns:
        Library module or schema, class or definition there, and the part.
    """
    found: list[tuple[str, str, Any]] = [("dashboard", "Dashboard", model)]
    for panel in model["panels"]:
        if panel["type"] != "row":
            kind = panel["type"].replace("-", "")
            found.append((kind, "Options", panel["options"]))
            found.append((kind, "FieldConfig", panel["fieldConfig"]["defaults"].get("custom", {})))
            found += [("prometheus", "Dataquery", target) for target in panel["targets"]]
    return found


def type_problems(model: dict[str, Any]) -> list[str]:
    found = []
    for module, name, value in parts(model):
        known = vars(import_module(f"grafana_foundation_sdk.models.{module}"))
        if name in known or value:  # a panel type without options of its own has no such class
            found += problems(value, known[name], module)
    return found


@each
def test_grafanas_types_agree(name: str) -> None:
    assert not type_problems(MODELS[name])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model["panels"][1]["gridPos"].update(w="4"), "gridPos/w: '4' is no int"),
        (lambda model: model["panels"][1].update(colour="red"), "is unknown to Panel"),
        (lambda model: model["panels"][1]["targets"][0].update(exrp="up"), "exrp is unknown to Dataquery"),
        (lambda model: model["panels"][1]["options"].update(colorMode="loud"), "colorMode: 'loud' is none of"),
        (lambda model: model["panels"][1]["options"].pop("graphMode"), "graphMode is missing"),
        (lambda model: model["time"].update({"from": 6}), "time/from: 6 is no str"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_types_find_what_is_wrong(change: Any, words: str) -> None:
    model = copy.deepcopy(MODELS["run-at-a-glance"])
    change(model)
    assert any(words in problem for problem in type_problems(model)), type_problems(model)


@pytest.mark.skipif(not SCHEMAS, reason="GRAFANA_SCHEMAS names no folder with grafana-foundation-sdk's jsonschema/*")
@each
def test_grafanas_json_schemas_agree(name: str) -> None:
    """The types above again, from another output of the same generator."""
    assert not [problem for part in parts(MODELS[name]) for problem in schema_problems(*part)]


def schema_problems(file: str, definition: str, value: Any) -> list[str]:
    """What Grafana's schema says against a value; a panel type without options of its own has no such definition."""
    jsonschema = pytest.importorskip("jsonschema")
    schema = anything_goes(json.loads((Path(SCHEMAS or "") / f"{file}.jsonschema.json").read_text(encoding="utf-8")))
    found = {key.lower(): key for key in schema["definitions"]}
    if definition.lower() not in found:
        return []
    schema["$ref"] = f"#/definitions/{found[definition.lower()]}"
    return [
        f"{file} {'/'.join(map(str, e.path))}: {e.message}"
        for e in jsonschema.Draft7Validator(schema).iter_errors(value)
    ]


def anything_goes(schema: Any) -> Any:
    """The schemas write "any value" as an object with any keys, which turns away numbers and texts."""
    if isinstance(schema, dict):
        if schema.get("type") == "object" and schema.get("additionalProperties") == {} and "properties" not in schema:
            return {}
        return {key: anything_goes(value) for key, value in schema.items()}
    return [anything_goes(value) for value in schema] if isinstance(schema, list) else schema


@each
def test_panels_are_numbered_and_do_not_overlap(name: str) -> None:
    panels = MODELS[name]["panels"]
    assert len({panel["title"] for panel in panels}) == len(panels)
    assert [panel["id"] for panel in panels] == list(range(1, len(panels) + 1))
    taken: dict[tuple[int, int], str] = {}
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] >= 0 and place["x"] + place["w"] <= 24, panel["title"]
        for cell in [
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ]:
            assert taken.setdefault(cell, panel["title"]) == panel["title"], cell
    width = Counter(y for _, y in taken)
    assert set(width.values()) == {24}, "a hole in the grid"


@pytest.mark.parametrize(
    ("name", "panel"), PANELS, ids=lambda value: value["title"] if isinstance(value, dict) else value
)
def test_every_panel_explains_itself(name: str, panel: dict[str, Any]) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    assert len(panel["description"]) > 15 and panel["description"].endswith(".")
    assert defaults["noValue"] and defaults["unit"] in KNOWN_UNITS
    assert panel["datasource"]["uid"] == "${datasource}"
    assert [target["refId"] for target in panel["targets"]] == [chr(65 + i) for i in range(len(panel["targets"]))]
    for target in panel["targets"]:
        assert target["datasource"]["uid"] == "${datasource}" and target["instant"] is not target["range"]
        of_frames = panel["type"] in ("table", "xychart")
        assert (target.get("format") == "table") is of_frames and (target["instant"] or not of_frames)
    for override in panel["fieldConfig"]["overrides"]:
        assert all(item["value"] in KNOWN_UNITS for item in override["properties"] if item["id"] == "unit")


def test_thresholds_rise() -> None:
    for _, panel in PANELS:
        lists = [panel["fieldConfig"]["defaults"].get("thresholds", {}).get("steps", [])]
        for override in panel["fieldConfig"]["overrides"]:
            lists += [item["value"]["steps"] for item in override["properties"] if item["id"] == "thresholds"]
        for steps in filter(None, lists):
            values = [step["value"] for step in steps]
            assert values[0] is None and values[1:] == sorted(values[1:]), panel["title"]


def test_rows_of_heatmaps_are_named_by_one_label() -> None:
    """Grafana orders rows by value only if every name is a number; GPUs are named so that their text sorts."""
    legends = {panel["targets"][0]["legendFormat"] for _, panel in PANELS if panel["type"] == "heatmap"}
    assert legends == {"{{le}}", "{{rank}}", "{{layer}}", "{{expert}}", "{{place}}"}


@each
def test_variables_are_defined_and_used(name: str) -> None:
    model = MODELS[name]
    defined = {variable["name"] for variable in model["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(model))) - BUILT_IN
    assert used <= defined and defined - used <= {"datasource"}, "a choice that changes nothing"
    multiple = {variable["name"] for variable in model["templating"]["list"] if variable.get("multi")}
    for expression in EXPRESSIONS:
        for label in multiple:
            assert not re.search(rf'="\${label}"', expression) or label == "run", expression


def test_links_lead_to_dashboards() -> None:
    addresses = {model["uid"] for model in MODELS.values()}
    assert len(addresses) == len(MODELS)
    links = set(re.findall(r"/d/([\w-]+)", json.dumps(MODELS)))
    assert links and links <= addresses
    for model in MODELS.values():
        (link,) = model["links"]
        assert link["tags"] == model["tags"] and link["includeVars"] and link["keepTime"]
        assert "inControlsMenu" not in json.dumps(model)  # it would hide links and marks in a menu


# --- what is asked ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not shutil.which("promtool"), reason="promtool is not installed: apt-get install prometheus")
def test_prometheus_reads_every_expression(tmp_path: Path) -> None:
    rules = [{"record": f"dashboard:{i}", "expr": without_variables(expr)} for i, expr in enumerate(EXPRESSIONS)]
    path = tmp_path / "rules.yml"
    path.write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    done = subprocess.run(["promtool", "check", "rules", path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_series_exists() -> None:
    known = exported() | {counter.name for counter in read_counters()} | NODE_METRICS.keys() | {"up", "ALERTS"}
    for path in (FOLDER / "rules").glob("*.yml"):
        groups = yaml.safe_load(path.read_text(encoding="utf-8"))["groups"]
        known |= {rule["record"] for group in groups for rule in group["rules"] if "record" in rule}
    for expression in EXPRESSIONS:
        asked = {name for name, _ in selectors(expression)}
        assert asked and asked <= known, expression


def test_every_selector_names_its_run_or_nodes() -> None:
    """Without it, one run's panel shows another's values."""
    for expression in EXPRESSIONS:
        for name, matchers in selectors(expression):
            if name.startswith(("DCGM_", "node_")):
                assert 'node=~"$node"' in matchers, expression
            elif name != "ALERTS":  # a run's, or those of the hardware
                assert re.search(r'run=~?"\$run"', matchers), expression
            if name == "up":
                assert 'job="moetrain"' in matchers, expression


def exported() -> set[str]:
    """Names of the samples of a rank that tells the run's values too."""
    series = Series(whole_run=True)
    series.layers, series.experts_LE = {"0": 2}, np.zeros((1, 2))
    for info in ("run", "rank", "version"):
        series.inform(info, {"known": "yes"})
    series.publish("train", dict.fromkeys(TIMES, 0.0))
    return set(re.findall(r"^([a-z]\w+)", series.page().decode(), re.MULTILINE))


def selectors(expression: str) -> list[tuple[str, str]]:
    """Names of series with what stands in braces behind them."""
    names = r"(?:moetrain_|DCGM_|node_infiniband|run:|rank:|up\b|ALERTS\b)[\w:]*"
    without_texts = re.sub(r'"[^"]*"', lambda match: match[0] if match[0].startswith('"$') else '""', expression)
    assert len(re.findall(rf"(?<![\w:]){names}", without_texts)) == len(re.findall(names + r"\{", expression)), (
        expression
    )
    return re.findall(rf"({names})\{{([^}}]*)\}}", expression)


def without_variables(expression: str) -> str:
    expression = re.sub(r"\$(__rate_interval|__range|__interval)", "5m", expression)
    return re.sub(r"\$__from", "0", expression)
