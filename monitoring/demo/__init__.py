"""A simulated cluster: runs of any number of ranks, their GPUs and nodes, and faults that are planted in them.

faults.py     what can go wrong, and which alert it raises
run.py        a run: steps, evaluations, checkpoints, in the series that a real rank exports
hardware.py   what dcgm-exporter and node_exporter say of its nodes
server.py     all of them on one port, and the discovery files
"""
