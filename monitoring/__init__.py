"""Watching runs: Prometheus' configuration, rules and dashboards, a stack on this machine, a simulated cluster."""
