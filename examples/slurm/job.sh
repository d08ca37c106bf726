# One start of a run on SLURM. A batch script sets the variables below and sources this file; see README.md.
#
#   RUN       directory of the run: its checkpoints (--save), metrics and, under RUN/slurm, what this file keeps
#   CODE      directory of pretrain_mesh.py and the package
#   SITE      file of the site's choices (site.sh)
#   SETTINGS  array of settings for pretrain_mesh.py, without --save and --load
#   optional: LOAD              checkpoint to start from, where RUN has none yet
#             REQUEUE           yes (default), or no where another job of a chain goes on
#             STARTS_PER_STEP   times (2) that the run may start from the same step before it is given up
#             FENCE_SECONDS     time (12) for an earlier start's processes to end: task.sh looks every 5 s

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
token=$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
owner_file=$RUN/run_owner.txt
asked=no interrupted=no srun_pid= last_resort=

say() { echo "[$(date '+%F %T') $token] $*"; }

word_in() { head -n 1 "$1" 2>/dev/null; }

owned() { [ "$(word_in "$owner_file")" = "$token" ]; }

# Runs a command again while it fails: SLURM's controller may be away for a moment.
retried() {
    for _ in 1 2 3 4 5; do
        "$@" && return
        sleep 10
    done
    "$@"
}

# A field of the job as SLURM has it now, such as JobState.
job_field() { retried scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null | grep -oPm 1 "(?<= $1=)\S+"; }

# Step of the newest complete checkpoint; a directory has its name only when it is complete.
saved_step() {
    local newest
    newest=$(ls "$RUN" 2>/dev/null | grep -xE 'iter_[0-9]+' | sort -t_ -k2 -n | tail -n 1)
    echo $((10#0${newest#iter_}))
}

# Only one start writes to a run: the one whose token is the first line of run_owner.txt. The processes of any
# other, which may live on after their node was given up, end themselves when they see it (task.sh). Rank 0
# adds who it is, and a counter that rises while it lives (megatron_mesh/runtime/ownership.py).
take_over() {
    local found before job
    found=$(cat "$owner_file" 2>/dev/null)
    before=${found%%$'\n'*} job=
    [[ ! $before =~ ^[0-9]+\.[0-9]+$ ]] || job=${before%.*}
    if [ -n "$job" ] && [ "$job" != "$SLURM_JOB_ID" ] &&
        [ -n "$(squeue -h -j "$job" -t running,completing,suspended -o %A 2>/dev/null)" ]; then
        say "error: job $job runs in $RUN; scancel it first, or let this one wait for it"
        exit 2
    fi
    if [ -n "$before" ] && [ -z "$job" ]; then # started without a batch script
        say "waiting ${FENCE_SECONDS:=12} s to see whether the earlier start in $RUN still runs"
        sleep "$FENCE_SECONDS" &
        wait $!
        if [ "$(cat "$owner_file" 2>/dev/null)" != "$found" ]; then
            say "error: another start runs in $RUN ($(sed -n 2p "$owner_file")); stop it first"
            exit 2
        fi
    fi
    echo "$token" >"$owner_file.$token"
    mv -f "$owner_file.$token" "$owner_file" # a new file: an earlier owner still writes to the old one
    if [ -n "$job" ]; then
        say "waiting ${FENCE_SECONDS:=12} s for what may be left of $before to end"
        sleep "$FENCE_SECONDS" &
        wait $!
    fi
}

# Whether the last starts were all from step $1: another one would bring nothing either.
stuck_at() {
    local starts
    starts=$(awk -v step="$1" '{ n = $2 == step ? n + 1 : 0 } END { print n + 0 }' "$RUN/slurm/starts.txt")
    [ "$starts" -ge "${STARTS_PER_STEP:-2}" ]
}

# SLURM's early warning. The file, not a signal: a signal during the start of python would end it, and the
# next one, at the time limit, must not count as the second. Written again and again, since a run that is
# just starting removes what an earlier one left.
on_warning() {
    say "asked to stop: saving"
    asked=yes interrupted=yes
    [ -z "$srun_pid" ] ||
        (while kill -0 "$srun_pid" && touch "$RUN/stop"; do sleep 2; done) 2>/dev/null &
}

# Time is up, or the job is to leave. The tasks are told too; what comes next is decided when they have ended.
on_end() {
    interrupted=yes
    [ -n "$srun_pid" ] || exit 143
    [ "$(job_field Reason)" = TimeLimit ] && [ -z "$last_resort" ] || return
    requeue_before_the_kill &
    last_resort=$!
}

# A save that is slower than SLURM's patience ends with a SIGKILL for this script too: shortly before that, the
# job is requeued, to go on from an earlier checkpoint.
requeue_before_the_kill() {
    local patience
    patience=$(scontrol show config | grep -oP '^KillWait\s*=\s*\K\d+')
    sleep $((patience > 10 ? patience - 5 : patience / 2))
    owned && [ "${REQUEUE:-yes}" = yes ] || return
    say "time is up, and the ranks do not end; requeued, to go on from step $(saved_step)"
    scontrol requeue "$SLURM_JOB_ID"
}

# Starts one task per GPU, and returns srun's status: the highest of the ranks.
train() {
    local first load=(--load "${LOAD:-$RUN}") inside=() options=(--kill-on-bad-exit=0 --wait=120)
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # The ranks choose the port (megatron_mesh/runtime/environment.py). Containers may lack scontrol.
    export MASTER_ADDR=${MASTER_ADDR:-$first}
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    [ "$(saved_step)" = 0 ] || load=(--load "$RUN" --no-finetune)
    case $ENVIRONMENT in
        venv) ;;
        pyxis) options+=(--container-image="$CONTAINER" --container-workdir="$PWD"
            --container-mounts="$(mounts)") ;;
        apptainer) inside=(apptainer exec --nv --bind "$(mounts)" --pwd "$PWD" "$CONTAINER") ;;
        *) say "error: ENVIRONMENT=$ENVIRONMENT in $SITE; take venv, pyxis or apptainer"; exit 2 ;;
    esac
    srun "${options[@]}" bash "$here/task.sh" "$owner_file" "$token" \
        "${inside[@]}" "$PYTHON" -u "$CODE/pretrain_mesh.py" "${SETTINGS[@]}" --save "$RUN" "${load[@]}" &
    srun_pid=$!
    [ $asked = no ] || on_warning # it came a moment ago
    # wait returns at every signal that has a trap.
    while wait "$srun_pid"; status=$?; [ $interrupted = yes ]; do interrupted=no; done
    return $status
}

# Directories for the container, each under its own name.
mounts() {
    printf '%s\n' "$RUN" "$CODE" "$here" "$PWD" "${CONTAINER_MOUNTS[@]}" | sort -u |
        sed 's/.*/&:&/' | paste -sd,
}

# Puts the job back in the queue; in a chain its next job goes on instead.
again() {
    if [ "${REQUEUE:-yes}" = no ]; then
        say "$1; the next job of the chain goes on from step $(saved_step)"
        exit 0
    fi
    say "$1; requeued, to go on from step $(saved_step)"
    [ -z "$last_resort" ] || kill "$last_resort"
    trap 'exit 1' TERM
    trap '' USR1
    retried scontrol requeue "$SLURM_JOB_ID" || { say "error: SLURM did not requeue the job"; exit 1; }
    [ "$(job_field JobState)" != RUNNING ] || sleep 60 & # SLURM ends this script, if it is not at that already
    wait $!
    exit 1
}

# What comes after srun has ended with status $1.
decide() {
    local ended state
    ended=$(word_in "$RUN/run_status.txt")
    # Further lines say why the run failed, and on which rank and host.
    tail -n +2 "$RUN/run_status.txt" 2>/dev/null | while IFS= read -r cause; do say "cause: $cause"; done
    owned || { say "another start has taken over; nothing to do"; exit 1; }
    # The ranks have agreed to end, so nobody is left who writes.
    case $ended in done | stopped) rm -f "$owner_file" ;; esac
    [ "$ended" != done ] || { say "trained to the end"; exit 0; }
    state=$(job_field JobState)/$(job_field Reason)
    case $state in
        RUNNING/*) ;;
        */TimeLimit) again "time is up" ;;
        *) say "ended by SLURM ($state) at step $(saved_step)"; exit "$1" ;; # scancel, requeue or preemption
    esac
    if [ "$ended" = stopped ]; then
        [ $asked = no ] || again "stopped early"
        # Preemption with a grace time: only the tasks are told, and without a requeue the job would be over.
        case $(job_field PreemptTime) in None | '') ;; *) again "preempted" ;; esac
        say "stopped on request at step $(saved_step); submit_slurm.py --requeue goes on"
        exit 0
    fi
    case $1 in # the exit statuses of pretrain_mesh.py that would come again
        2) say "error: the settings were refused; not requeued"; exit 2 ;;
        4) say "error: the last checkpoint could not be saved; not requeued"; exit 4 ;;
        5) say "error: the loss diverged; not requeued"; exit 5 ;;
    esac
    stuck_at "$(saved_step)" || again "failed with exit status $1"
    say "error: failed with exit status $1; the restart brought no new step, so this was the last one"
    exit "$1"
}

main() {
    local from
    trap on_warning USR1
    trap on_end TERM
    # What the shell that submitted the job had for a run of its own.
    unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT
    mkdir -p "$RUN/slurm"
    touch "$RUN/slurm/starts.txt"
    prepare
    take_over
    [ "$(word_in "$RUN/run_status.txt")" != done ] || { say "was trained to the end before"; exit 0; }
    [ $asked = no ] || again "stopped before the start"
    from=$(saved_step)
    if stuck_at "$from"; then
        say "error: given up: the last starts, all from step $from, brought no later checkpoint"
        exit 1
    fi
    echo "$token $from" >>"$RUN/slurm/starts.txt"
    rm -f "$RUN/run_status.txt" "$RUN/stop"
    owned || exit 1
    say "start on $SLURM_JOB_NODELIST from step $from"
    train
    decide $?
}

. "$SITE"
main
