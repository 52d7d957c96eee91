"""Runs after the fact: one page that loads nothing, pictures, and the configuration as documented YAML.

read_history   metrics.jsonl, config.yaml -> columns over the steps
page           columns -> HTML with inline SVG
pictures       columns -> PNG
"""

from __future__ import annotations

from moetrain.report.settings import CONFIG_FILE, config_yaml
from moetrain.report.write import report, write_comparison, write_report

__all__ = ["CONFIG_FILE", "config_yaml", "report", "write_comparison", "write_report"]
