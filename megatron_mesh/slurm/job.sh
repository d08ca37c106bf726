# One start of a run on SLURM. A batch script sets the variables below and sources this file;
# examples/slurm/README.md explains what it does.
#
#   RUN       the run's directory: checkpoints (--save), metrics and, in RUN/slurm, the files of its jobs
#   CODE      the directory of pretrain_mesh.py and the package
#   SITE      the site file, a copy of site.sh
#   SETTINGS  array of flags for pretrain_mesh.py, without --save and --load
#   optional: LOAD              checkpoint to start from if RUN has none yet
#             REQUEUE           yes (default), or no if the next job of a chain resumes the run
#             FAILURES_PER_STEP give up when the run has failed this often (2) at the same step
#             HOOK_SECONDS      time limit (20) of the site's on_end_hook
#             FENCE_SECONDS     time (12) for an earlier start's processes to end; task.sh checks every 5 s

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
owner_file=$RUN/run_owner.txt
asked=no interrupted=no srun_pid= last_resort=
# Exit status of a run that can be resumed. It is not 0, so that "afterok" jobs don't start on a half-trained model.
# It is EX_TEMPFAIL of sysexits.h and not the trainer's 42, which some sites list in RequeueExit.
readonly UNFINISHED=75

log_line() { echo "[$(date '+%F %T') $token] $*"; }

# Records an event for --status: TOKEN STEP EVENT TIME TEXT. EVENT is start, or the first argument of finish.
record_event() { echo "$token $(saved_step) $1 $(date -Is) $2" >>"$RUN/slurm/starts.txt"; }

first_line() { head -n 1 "$1" 2>/dev/null; }

# Whether this start may still write to RUN: the owner file holds its token, or is missing.
owned() {
    local now
    now=$(first_line "$owner_file")
    [ -z "$now" ] || [ "$now" = "$token" ]
}

# Called when no process of this start writes any more, so that the next start needn't wait.
release_run() { [ "$(first_line "$owner_file")" != "$token" ] || rm -f "$owner_file"; }

# Retries a command that fails, since SLURM's controller may be unreachable for a moment.
retried() {
    for _ in 1 2 3 4 5; do
        "$@" && return
        sleep 10
    done
    "$@"
}

# The current value of a field of this job, such as JobState.
job_field() { retried scontrol -o show job "$this_job" 2>/dev/null | grep -oPm 1 "(?<= $1=)\S+"; }

# The step of the newest complete checkpoint. A directory gets its final name only when it is complete.
saved_step() {
    local newest
    newest=$(ls "$RUN" 2>/dev/null | grep -xE 'iter_[0-9]+' | sort -t_ -k2 -n | tail -n 1)
    echo $((10#0${newest#iter_}))
}

# Only one start may write to a run: the one whose token is the first line of run_owner.txt. Processes of another
# start, which may survive on a node that SLURM gave up, kill themselves when they see the new token (task.sh).
# Rank 0 adds its identity and a counter that rises while it is alive (megatron_mesh/runtime/ownership.py).
take_over() {
    local found before job= states
    found=$(cat "$owner_file" 2>/dev/null)
    before=${found%%$'\n'*}
    [[ ! $before =~ ^[0-9]+(_[0-9]+)?\.[0-9]+$ ]] || job=${before%.*}
    if [ -n "$before" ] && [ "$job" != "$this_job" ]; then
        [ -z "$job" ] || states=$(squeue -h -j "$job" -t all -o %T 2>/dev/null)
        case ${states:-} in
            *RUNNING* | *CONFIGURING* | *COMPLETING* | *SUSPENDED* | *STOPPED* | *STAGE_OUT*)
                refuse 2 "error: job $job is running in $RUN; scancel it first, or start after it has ended" ;;
            NODE_FAIL) ;; # its ranks may still be alive; the new token ends them
            *) watch_owner "$found" ;; # SLURM no longer knows the job, or another cluster's SLURM does
        esac
    fi
    echo "$token" >"$owner_file.$token"
    mv -f "$owner_file.$token" "$owner_file" # replace the file, since an earlier owner may still write to the old one
    if [ -n "$job" ]; then
        log_line "waiting ${FENCE_SECONDS:=12} s for remaining processes of $before to end"
        pause "$FENCE_SECONDS"
    fi
}

# Refuses to start if the owner raises its counter. $1 is the present content of the owner file.
watch_owner() {
    local now
    log_line "waiting ${FENCE_SECONDS:=12} s to see whether an earlier start is still running in $RUN"
    pause "$FENCE_SECONDS"
    now=$(cat "$owner_file" 2>/dev/null)
    [ -z "$now" ] || [ "$now" = "$1" ] || # an empty answer means that it has just ended
        refuse 2 "error: another start is running in $RUN ($(head -n 2 <<<"$now" | paste -sd' ')); stop it first"
}

# Sleeps, but runs traps without delay.
pause() {
    local sleeping
    sleep "$1" &
    sleeping=$!
    while kill -0 "$sleeping" 2>/dev/null; do wait "$sleeping"; done
}

# Whether the run has failed so often at step $1 that another restart won't help. Preemptions, lost nodes and time
# limits don't count as failures of the run.
failed_too_often_at() {
    local failures
    failures=$(awk -v step="$1" '
        $1 == "by-hand" { n = 0 }
        $3 == "failed" { n = $2 == step ? n + 1 : 0 }
        END { print n + 0 }' "$RUN/slurm/starts.txt")
    [ "$failures" -ge "${FAILURES_PER_STEP:-${STARTS_PER_STEP:-2}}" ] # STARTS_PER_STEP: its name in older site files
}

# SLURM's early warning. It reaches the ranks as a file, not as a signal: a signal would kill a Python that is just
# starting, and the ranks take a second signal, which comes at the time limit, as the order to end at once. The file
# is written repeatedly, since a starting run removes an old one.
on_warning() {
    asked=yes interrupted=yes
    [ -n "$srun_pid" ] || { log_line "asked to stop before the start; there is nothing to save"; return; }
    log_line "asked to stop; the ranks save a checkpoint"
    (while kill -0 "$srun_pid" && touch "$RUN/stop"; do sleep 2; done) 2>/dev/null &
}

# SIGTERM: time is up, or the job must leave its nodes. The tasks get it too, and decide() runs when they have ended.
on_end() {
    interrupted=yes
    if [ -z "$srun_pid" ]; then
        owned || refuse 143 "ended by SLURM before the start"
        finish ended 143 "ended by SLURM before the start"
    fi
    [ "$(job_field Reason)" = TimeLimit ] && [ -z "$last_resort" ] || return
    requeue_before_the_kill &
    last_resort=$!
}

# If a save takes longer than KillWait, SLURM kills this script too. Shortly before that, requeue the job, so that it
# resumes from an earlier checkpoint.
requeue_before_the_kill() {
    local kill_wait text
    kill_wait=$(scontrol show config | grep -oP '^KillWait\s*=\s*\K\d+')
    sleep $((kill_wait > 10 ? kill_wait - 5 : kill_wait / 2))
    owned && [ "${REQUEUE:-yes}" = yes ] || return
    text="time is up, and the ranks do not end; requeued, to resume from step $(saved_step)"
    log_line "$text"
    record_event resumes "$text"
    scontrol requeue "$this_job"
}

# Starts one task per GPU and returns the exit status of srun, which is the highest of the ranks'.
train() {
    local first load=(--load "${LOAD:-$RUN}") inside=() options=(--kill-on-bad-exit=0 --wait=120)
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # Set here because containers may lack scontrol. The ranks choose the port (megatron_mesh/runtime/rendezvous.py).
    export MASTER_ADDR=${MASTER_ADDR:-$first}
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
    [ "$(saved_step)" = 0 ] || load=(--load "$RUN" --no-finetune)
    case $ENVIRONMENT in
        venv) ;;
        pyxis) options+=(--container-image="$CONTAINER" --container-workdir="$PWD"
            --container-mounts="$(mounts)") ;;
        apptainer) inside=(apptainer exec --nv --bind "$(mounts)" --pwd "$PWD" "$CONTAINER") ;;
        *) finish failed 2 "error: ENVIRONMENT=$ENVIRONMENT in $SITE must be venv, pyxis or apptainer" ;;
    esac
    # Full paths and --export=ALL, since the site may submit with --export=NONE.
    srun "${options[@]}" --export=ALL /bin/bash "$here/task.sh" "$owner_file" "$token" \
        "${inside[@]}" "$PYTHON" -u "$CODE/pretrain_mesh.py" "${SETTINGS[@]}" --save "$RUN" "${load[@]}" &
    srun_pid=$!
    [ $asked = no ] || on_warning # the warning came before srun had started
    # wait returns whenever a trap runs, so wait again.
    while wait "$srun_pid"; status=$?; [ $interrupted = yes ]; do interrupted=no; done
    return $status
}

# The directories that a container sees, each under the same path as outside.
mounts() {
    printf '%s\n' "$RUN" "$CODE" "$here" "$PWD" "${CONTAINER_MOUNTS[@]}" | sort -u |
        sed 's/.*/&:&/' | paste -sd,
}

# Ends this start: logs and records the reason $3, calls the site's hook and exits with status $2. $1 is the event:
# done, stopped (--requeue resumes), failed (not requeued), given-up (failed too often), ended (by SLURM) or resumes
# (requeued, or resumed by the next job of a chain).
finish() {
    log_line "$3"
    record_event "$1" "$3"
    hook "$1"
    exit "$2"
}

# Like finish, but for a start that must not write to RUN because another start owns it: only logs and calls the hook.
refuse() {
    log_line "$2"
    hook refused
    exit "$1"
}

# Calls the site's on_end_hook in a separate shell, so that it cannot change how the job ends.
hook() {
    declare -F on_end_hook >/dev/null || return 0
    (trap '' TERM USR1 && exec timeout -s KILL "${HOOK_SECONDS:-20}" bash -c '. "$1" && shift && on_end_hook "$@"' \
        bash "$SITE" "$1" "$(saved_step)" "$RUN" </dev/null) ||
        log_line "on_end_hook failed with exit status $? (137: killed after ${HOOK_SECONDS:-20} s)"
}

# Puts the job back in the queue, or, in a chain, leaves the run to the next job.
resume_later() {
    [ "${REQUEUE:-yes}" = yes ] ||
        finish resumes $UNFINISHED "$1; the next job of the chain resumes from step $(saved_step)"
    log_line "$1; requeued, to resume from step $(saved_step)"
    record_event resumes "$1; requeued"
    [ -z "$last_resort" ] || kill "$last_resort"
    trap 'interrupted=leaving' TERM
    trap '' USR1
    retried scontrol requeue "$this_job" || finish failed 1 "error: SLURM did not requeue the job"
    hook resumes
    if [ $interrupted != leaving ] && [ "$(job_field JobState)" = RUNNING ]; then
        sleep 60 & # until SLURM ends this script
        wait $!
    fi
    exit 1
}

# Finds out why SLURM ends the job. The state $1 helps little: it is COMPLETING for most causes.
end_reason() {
    local now down
    now=$(job_field Restarts)
    down=$(sinfo -h -n "$SLURM_JOB_NODELIST" -t down,fail -o %N 2>/dev/null | paste -sd,)
    case $1 in
        *held*) echo "requeued and held" ;;
        OUT_OF_MEMORY/*) echo "out of memory" ;;
        *) if [ -n "$down" ]; then
            echo "node $down is down"
        elif [ "${now:-0}" -gt "$restarts" ]; then
            echo "preempted or requeued"
        elif [ -z "${1%/*}" ]; then
            echo "SLURM's controller gives no reason"
        else
            echo "cancelled"
        fi ;;
    esac
}

# Decides what to do after srun has ended with status $1.
decide() {
    local ended state text
    ended=$(first_line "$RUN/run_status.txt")
    # The other lines say why the run failed, and on which rank and host.
    tail -n +2 "$RUN/run_status.txt" 2>/dev/null | while IFS= read -r cause; do log_line "cause: $cause"; done
    retried test -r "$owner_file" # the file system may be unavailable for a moment
    owned || refuse 1 "another start has taken over; nothing to do"
    case $ended in done | stopped) release_run ;; esac # all ranks have agreed to end
    [ "$ended" != done ] || finish done 0 "trained to the end"
    state=$(job_field JobState)/$(job_field Reason)
    case $state in
        RUNNING/*) ;;
        */TimeLimit) resume_later "time is up" ;;
        *) finish ended "$1" "ended by SLURM at step $(saved_step): $(end_reason "$state")" ;;
    esac
    # On preemption with a grace time only the tasks get a signal, and without a requeue the job would be over.
    case $(job_field PreemptTime) in None | '') ;; *) resume_later "preempted" ;; esac
    if [ "$ended" = stopped ]; then
        [ $asked = no ] || resume_later "stopped early"
        finish stopped $UNFINISHED "stopped on request at step $(saved_step); submit_slurm.py --requeue resumes"
    fi
    case $1 in # exit statuses of pretrain_mesh.py after which a restart would fail the same way
        2) finish failed 2 "error: the settings were refused; not requeued" ;;
        4) finish failed 4 "error: the last checkpoint could not be saved; not requeued" ;;
        5) finish failed 5 "error: the loss diverged; not requeued" ;;
    esac
    text="failed with exit status $1"
    record_event failed "$text"
    failed_too_often_at "$(saved_step)" || resume_later "$text"
    # Even if srun ended with 0, the run is not complete.
    finish given-up $(($1 ? $1 : 1)) "error: $text; given up, because the restart brought no new step"
}

main() {
    local from=0 origin
    trap on_warning USR1
    trap on_end TERM
    mkdir -p "$RUN/slurm"
    touch "$RUN/slurm/starts.txt"
    prepare
    take_over
    if [ "$(first_line "$RUN/run_status.txt")" = done ]; then
        release_run
        finish done 0 "already trained to the end"
    fi
    # A user submitted this job and knows how the last one ended, so earlier failures no longer count.
    if [ "$restarts" = 0 ] && [ "${REQUEUE:-yes}" = yes ] && [ -s "$RUN/slurm/starts.txt" ]; then
        echo "by-hand -" >>"$RUN/slurm/starts.txt"
    fi
    [ $asked = no ] || resume_later "stopped before the start"
    from=$(saved_step)
    ! failed_too_often_at "$from" ||
        finish given-up 1 "error: given up after repeated failures at step $from; submit_slurm.py --requeue tries again"
    rm -f "$RUN/run_status.txt" "$RUN/stop"
    owned || refuse 1 "another start has taken over; nothing to do"
    origin="from step $from"
    [ "$from" != 0 ] || [ -z "${LOAD:-}" ] || origin="from the checkpoint in $LOAD"
    log_line "start on $SLURM_JOB_NODELIST $origin"
    record_event start "on $SLURM_JOB_NODELIST $origin"
    train
    decide $?
}

. "$here/environment.sh"
trap 'asked=yes' USR1 # until main sets the full handler
identify
drop_outer_job_variables
. "$SITE"
[ -z "${SLURM_HET_SIZE:-}" ] || refuse 2 \
    "error: a run cannot use a heterogeneous job ($SLURM_HET_SIZE parts); submit one part with identical nodes"
main
