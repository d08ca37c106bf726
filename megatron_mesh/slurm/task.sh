# One process of a run: task.sh OWNER_FILE TOKEN COMMAND...
#
# Runs COMMAND as long as the first line of OWNER_FILE is TOKEN. A node that SLURM has given up may still run its
# tasks. They end at once when another start of the run has put its own token there, so that they don't write too.

owner_file=$1 token=$2
shift 2

taken() {
    local now
    now=$(head -n 1 "$owner_file" 2>/dev/null)
    [ -n "$now" ] && [ "$now" != "$token" ] # a file that cannot be read just now says nothing
}

(
    trap '' TERM USR1 # these are for the command
    exec >/dev/null 2>&1 # srun waits for whoever holds the task's output
    while kill -0 $$; do
        ! taken || kill -KILL 0 # the task's process group, with all that it has started
        sleep 5
    done
) &

# Rank 0 takes over the file in this token's name (megatron_mesh/runtime/ownership.py).
export MESH_RUN_TOKEN=$token
exec "$@"
