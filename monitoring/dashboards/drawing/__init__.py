"""Panels drawn without a Grafana: answers of Prometheus to SVG and HTML."""
