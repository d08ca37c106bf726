# One process of a run: task.sh OWNER_FILE TOKEN COMMAND...
#
# Runs COMMAND, and kills it when another start's token is in the first line of OWNER_FILE. A node that SLURM gave up
# may still run its tasks; this keeps them from writing to the run at the same time as the new start.

owner_file=$1 token=$2
shift 2

taken() {
    local now
    now=$(head -n 1 "$owner_file" 2>/dev/null)
    [ -n "$now" ] && [ "$now" != "$token" ] # an unreadable file doesn't count
}

(
    trap '' TERM USR1 # these signals are for the command
    exec >/dev/null 2>&1 # srun waits for every process that holds the task's output
    while kill -0 $$; do
        ! taken || kill -KILL 0 # the task's process group, including all that it has started
        sleep 5
    done
) &

# With this token, rank 0 recognizes the owner file as its own (megatron_mesh/runtime/ownership.py).
export MESH_RUN_TOKEN=$token
exec "$@"
