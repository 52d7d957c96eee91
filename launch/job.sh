# Around the training step of a job: which nodes, in which order, and what happens when the step has ended.
#
# The batch script sources this file; it runs on the job's first node, outside of any container, where scontrol is.
# It sets before:
#   JOB_DIR          folder of the submission, on the shared file system
#   OUTPUT_DIRS      output_dir of the run, or one for each task of an array
#   NODES            nodes that train; the allocation may hold spares
#   RANKS_PER_NODE   ranks on each of them
#   EXCLUDE          nodes that the site excludes, separated by commas
#   PREFLIGHT        command of the preflight step as an array, empty for none
#
# Exit codes of a job: 0 finished; 2, 126, 127 an error that a restart would not mend; 69 no node is fit to train;
# 75 stopped to be continued, and requeued; 79 three restarts brought no new checkpoint.

UNAVAILABLE=69
CONTINUE=75
NO_PROGRESS=79
RESTARTS_WITHOUT_PROGRESS=3
USERS_TO_MEND='2|126|127'

task=${SLURM_ARRAY_TASK_ID:-}
CONFIG=$JOB_DIR/config${task:+-$task}.yaml
OUTPUT_DIR=${OUTPUT_DIRS[${task:-0}]}
: "${HOME:=$(getent passwd "$(id -u)" | cut -d: -f6)}"
export HOME
unfit=() fit=()

say() {
    echo "$(date '+%F %T') job $SLURM_JOB_ID: $*"
}

# Step of the newest complete checkpoint, -1 without one. A directory has its name only when it is complete.
newest_step() {
    local newest=-1 path
    for path in "$OUTPUT_DIR"/checkpoints/step-*; do
        if [[ $path =~ /step-([0-9]+)$ ]] && ((10#${BASH_REMATCH[1]} > newest)); then
            newest=$((10#${BASH_REMATCH[1]}))
        fi
    done
    echo "$newest"
}

# Remember where the job began, to know later whether it gets on.
begin() {
    progress_file=$JOB_DIR/progress-$SLURM_JOB_ID
    excluded_file=$JOB_DIR/excluded-$SLURM_JOB_ID
    wrong_file=$JOB_DIR/wrong-$SLURM_JOB_ID
    rm -f "$wrong_file"
    [ -s "$progress_file" ] || echo "$(newest_step) 0" > "$progress_file"
    say "start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST"
}

# Run the preflight step on all nodes; the unfit ones go to `unfit`, those that took part in order to `fit`.
# A node without a verdict is unfit. Warnings and what could not be checked do not count against a node.
preflight() {
    unfit=() fit=()
    local results=$JOB_DIR/preflight-$SLURM_JOB_ID nodes node code peers
    mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
    if [ ${#PREFLIGHT[@]} = 0 ]; then
        fit=("${nodes[@]}")
        return
    fi
    mkdir -p "$results"
    rm -f "$results"/*
    peers=$(for node in "${nodes[@]}"; do echo "$node=$(address "$node")"; done | paste -sd,)
    "${PREFLIGHT[@]}" --peers "$peers"
    for node in "${nodes[@]}"; do
        code=$(cat "$results/$node.code" 2> /dev/null)
        case $code in
            0 | 1 | 3) fit+=("$node") ;;
            *)
                unfit+=("$node")
                say "preflight: $node is unfit: $(grep -s '^CRITICAL' "$results/$node.txt" || echo "no verdict, see $results")"
                ;;
        esac
    done
    say "preflight: ${#fit[@]} of ${#nodes[@]} nodes are fit"
}

address() {
    scontrol show node --oneliner "$1" | sed -n 's/.* NodeAddr=\([^ ]*\).*/\1/p'
}

# Place the ranks: fit nodes in the order of the network's topology, so that neighbours in rank are neighbours there.
place_ranks() {
    local ordered node file=$JOB_DIR/hosts-$SLURM_JOB_ID
    preflight
    if [ ${#fit[@]} = 0 ]; then
        say "no node is fit to train; see $JOB_DIR/preflight-$SLURM_JOB_ID and the limits in the site file"
        exit $UNAVAILABLE
    fi
    if ((${#fit[@]} < NODES)); then
        restart "${#fit[@]} fit nodes are too few for $NODES; --spares asks for more than the run needs"
    fi
    mapfile -t ordered < <(
        srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 --export=PATH \
            sh -c 'echo "$SLURM_TOPOLOGY_ADDR $SLURMD_NODENAME"' | sort -V | sed 's/.* //'
    )
    for node in "${ordered[@]}"; do
        [[ " ${fit[*]} " == *" $node "* ]] && printf "$node\n%.0s" $(seq "$RANKS_PER_NODE")
    done | head -n $((NODES * RANKS_PER_NODE)) > "$file"
    export SLURM_HOSTFILE=$file
    MASTER_ADDR=$(address "$(head -n 1 "$file")")
    MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000))
    WORLD_SIZE=$((NODES * RANKS_PER_NODE))
    LOCAL_WORLD_SIZE=$RANKS_PER_NODE
    export MASTER_ADDR MASTER_PORT WORLD_SIZE LOCAL_WORLD_SIZE
    say "$WORLD_SIZE ranks on $(uniq "$file" | paste -sd,)"
    exec 2> >(heed)
    heeding=$!
}

# Pass on what srun says of the ranks. As soon as one has ended with a code that a restart would not mend, remember the
# code and end the step: the others would wait for that rank and be killed in the end, with a higher code for the step.
heed() {
    local line steps
    while IFS= read -r line; do
        echo "$line"
        if [[ $line =~ ^srun:\ error:\ .*:\ tasks?\ ([^:]+):\ Exited\ with\ exit\ code\ ($USERS_TO_MEND)$ ]]; then
            [ ! -s "$wrong_file" ] || continue
            echo "${BASH_REMATCH[2]} ${BASH_REMATCH[1]}" > "$wrong_file"
            mapfile -t steps < <(squeue --noheader --steps --jobs="$SLURM_JOB_ID" --format=%i | grep '\.[0-9]*$')
            [ ${#steps[@]} = 0 ] || scancel "${steps[@]}"
        fi
    done
}

# The training step has ended with a code.
finish() {
    local code=$1 ranks
    exec 2>&1
    [ -z "${heeding:-}" ] || wait "$heeding"
    if [ -s "$wrong_file" ]; then
        read -r code ranks < "$wrong_file"
        say "exit code $code of rank $ranks: a restart would not mend this; the reason is in the rank's log in $JOB_DIR"
        exit "$code"
    fi
    case $code in
        0)
            say "finished"
            exit 0
            ;;
        2 | 126 | 127)
            say "exit code $code: a restart would not mend this; the reason is above, or in the log of another rank"
            exit "$code"
            ;;
        "$CONTINUE") restart "stopped by a signal and saved" ;;
        *) restart "the training step ended with exit code $code" ;;
    esac
}

# Put the job back into the queue, once, without the unfit nodes; but not when restarts have not brought it on.
restart() {
    local step last restarts
    read -r last restarts < "$progress_file"
    step=$(newest_step)
    restarts=$((step > last ? 0 : restarts + 1))
    if ((restarts > RESTARTS_WITHOUT_PROGRESS)); then
        say "$1; $RESTARTS_WITHOUT_PROGRESS restarts brought no new checkpoint (newest: step $step): not requeued"
        exit $NO_PROGRESS
    fi
    echo "$step $restarts" > "$progress_file"
    say "$1; newest checkpoint: step $step; restarts without a new one: $restarts; requeued"
    trap '' TERM # requeueing ends this script, which has a line more
    if ! scontrol requeue "$SLURM_JOB_ID"; then
        say "it could not be requeued; submit it again, and it goes on from its newest checkpoint"
        exit $CONTINUE
    fi
    if [ ${#unfit[@]} != 0 ]; then
        printf '%s\n' "${unfit[@]}" >> "$excluded_file"
        scontrol update JobId="$SLURM_JOB_ID" ExcNodeList="$(sort -u "$excluded_file" | paste -sd,)${EXCLUDE:+,$EXCLUDE}"
    fi
    exit $CONTINUE
}
