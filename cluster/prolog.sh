#!/bin/bash
# Slurm prolog: a node that is unfit is drained, with the reason, before a job starts on it.
#
#   slurm.conf:  Prolog=/opt/moetrain/cluster/prolog.sh
#
# Copy the directory `cluster` with the site file as site.toml to the same place on every node. It runs as root on the
# node, outside of containers, with the node's own Python 3.11 or newer; torch is not needed.

here=$(cd "$(dirname "$0")" && pwd)
found=$(cd "$here/.." && "${PYTHON:-python3}" -m cluster.preflight --quick --site "$here/site.toml" 2>&1)
code=$?

# Only what is critical counts. A node must not be drained because the check itself is not set up.
if [ $code = 2 ]; then
    reason=$(grep -m 1 '^CRITICAL' <<< "$found" | tr -s ' ' | cut -c 1-200)
    scontrol update NodeName="$SLURMD_NODENAME" State=DRAIN Reason="preflight: $reason"
    exit 1 # the job goes back into the queue
fi
exit 0
