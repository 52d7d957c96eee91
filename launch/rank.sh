# What each task of the training step runs: it becomes a rank, and then the command that it is given.
#
# A Python without moetrain would end with 1, as a crash does, and be restarted. It ends with 2 here, for the user to
# mend. A directory called moetrain, which Python takes for a package too, has no origin.

export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
"$1" -c '
import importlib.util, sys
sys.exit(3 if getattr(importlib.util.find_spec("moetrain"), "origin", None) is None else 0)'
if [ $? = 3 ]; then
    echo "error: $1 has no moetrain; paths.python of the site file must name a Python that has it"
    exit 2
fi
exec "$@"
