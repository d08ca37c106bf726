# One process of a run: task.sh OWNER_FILE TOKEN COMMAND...
#
# Runs COMMAND as long as OWNER_FILE names TOKEN. A node that SLURM has given up may still run its tasks; when
# another start of the run has put its own token there, they end at once, before they can write beside it.

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

exec "$@"
