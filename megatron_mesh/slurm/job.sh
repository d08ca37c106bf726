# One start of a run on SLURM. A batch script sets the variables below and sources this file; see README.md.
#
#   RUN       directory of the run: its checkpoints (--save), metrics and, under RUN/slurm, what this file keeps
#   CODE      directory of pretrain_mesh.py and the package
#   SITE      file of the site's choices (site.sh)
#   SETTINGS  array of settings for pretrain_mesh.py, without --save and --load
#   optional: LOAD              checkpoint to start from if RUN has none yet
#             REQUEUE           yes (default), or no if another job of a chain resumes
#             FAILURES_PER_STEP times (2) that the run may fail at the same step before it is given up
#             HOOK_SECONDS      time (20) for the site's on_end_hook
#             FENCE_SECONDS     time (12) for an earlier start's processes to end: task.sh looks every 5 s

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
owner_file=$RUN/run_owner.txt
asked=no interrupted=no srun_pid= last_resort=
# Exit status of a run that can be resumed, so that jobs waiting for "afterok" do not start on a half-trained model.
# It is EX_TEMPFAIL of sysexits.h. Not the trainer's 42: sites name that one in RequeueExit.
readonly UNFINISHED=75

say() { echo "[$(date '+%F %T') $token] $*"; }

# For --status: TOKEN STEP EVENT TIME TEXT. The event is start, or what finish takes.
note() { echo "$token $(saved_step) $1 $(date -Is) $2" >>"$RUN/slurm/starts.txt"; }

word_in() { head -n 1 "$1" 2>/dev/null; }

# Whether this start may still write to RUN: no other's token is there. A file that is gone says nothing.
owned() {
    local now
    now=$(word_in "$owner_file")
    [ -z "$now" ] || [ "$now" = "$token" ]
}

# Nobody of this start writes any more, so another need not wait.
disown_run() { [ "$(word_in "$owner_file")" != "$token" ] || rm -f "$owner_file"; }

# Runs a command again while it fails: SLURM's controller may be away for a moment.
retried() {
    for _ in 1 2 3 4 5; do
        "$@" && return
        sleep 10
    done
    "$@"
}

# A field of the job as SLURM has it now, such as JobState.
job_field() { retried scontrol -o show job "$this_job" 2>/dev/null | grep -oPm 1 "(?<= $1=)\S+"; }

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
    local found before job= states
    found=$(cat "$owner_file" 2>/dev/null)
    before=${found%%$'\n'*}
    [[ ! $before =~ ^[0-9]+(_[0-9]+)?\.[0-9]+$ ]] || job=${before%.*}
    if [ -n "$before" ] && [ "$job" != "$this_job" ]; then
        [ -z "$job" ] || states=$(squeue -h -j "$job" -t all -o %T 2>/dev/null)
        case ${states:-} in
            *RUNNING* | *CONFIGURING* | *COMPLETING* | *SUSPENDED* | *STOPPED* | *STAGE_OUT*)
                refuse 2 "error: job $job runs in $RUN; scancel it first, or let this one wait for it" ;;
            NODE_FAIL) ;; # its ranks may live on
            *) watch_owner "$found" ;; # SLURM has forgotten the job, or another cluster's SLURM knows it
        esac
    fi
    echo "$token" >"$owner_file.$token"
    mv -f "$owner_file.$token" "$owner_file" # a new file: an earlier owner still writes to the old one
    if [ -n "$job" ]; then
        say "waiting ${FENCE_SECONDS:=12} s for what may be left of $before to end"
        pause "$FENCE_SECONDS"
    fi
}

# Refuses to start if the owner, whose file holds $1, raises its counter.
watch_owner() {
    local now
    say "waiting ${FENCE_SECONDS:=12} s to see whether the earlier start in $RUN still runs"
    pause "$FENCE_SECONDS"
    now=$(cat "$owner_file" 2>/dev/null)
    [ -z "$now" ] || [ "$now" = "$1" ] || # gone: it has just ended
        refuse 2 "error: another start runs in $RUN ($(head -n 2 <<<"$now" | paste -sd' ')); stop it first"
}

# Sleeps, and runs traps at once.
pause() {
    local sleeping
    sleep "$1" &
    sleeping=$!
    while kill -0 "$sleeping" 2>/dev/null; do wait "$sleeping"; done
}

# Whether the run has failed at step $1 so often that restarting will not help. Preemption, a lost node and the
# time limit are not the run's failures, so they do not count.
stuck_at() {
    local failures
    failures=$(awk -v step="$1" '
        $1 == "by-hand" { n = 0 }
        $3 == "failed" { n = $2 == step ? n + 1 : 0 }
        END { print n + 0 }' "$RUN/slurm/starts.txt")
    [ "$failures" -ge "${FAILURES_PER_STEP:-${STARTS_PER_STEP:-2}}" ] # the second is its name in older site files
}

# SLURM's early warning. The file, not a signal: a signal during the start of python would end it, and the
# next one, at the time limit, must not count as the second. Written again and again, since a run that is
# just starting removes what an earlier one left.
on_warning() {
    asked=yes interrupted=yes
    [ -n "$srun_pid" ] || { say "asked to stop before the start; there is nothing to save"; return; }
    say "asked to stop; the ranks save what they have trained"
    (while kill -0 "$srun_pid" && touch "$RUN/stop"; do sleep 2; done) 2>/dev/null &
}

# Time is up, or the job has to leave. The tasks are told too; what comes next is decided when they have ended.
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

# A save that is slower than SLURM's patience ends with a SIGKILL for this script too. Shortly before that, the
# job is requeued, to resume from an earlier checkpoint.
requeue_before_the_kill() {
    local patience words
    patience=$(scontrol show config | grep -oP '^KillWait\s*=\s*\K\d+')
    sleep $((patience > 10 ? patience - 5 : patience / 2))
    owned && [ "${REQUEUE:-yes}" = yes ] || return
    words="time is up, and the ranks do not end; requeued, to resume from step $(saved_step)"
    say "$words"
    note resumes "$words"
    scontrol requeue "$this_job"
}

# Starts one task per GPU, and returns srun's status: the highest of the ranks.
train() {
    local first load=(--load "${LOAD:-$RUN}") inside=() options=(--kill-on-bad-exit=0 --wait=120)
    first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
    # The ranks choose the port (megatron_mesh/runtime/rendezvous.py). Containers may lack scontrol.
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
    # Everything by its full name and with all variables: the site may submit with --export=NONE.
    srun "${options[@]}" --export=ALL /bin/bash "$here/task.sh" "$owner_file" "$token" \
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

# Ends this start: says why ($3), for --status too, calls the site's hook and exits with status $2. $1 is done,
# stopped (--requeue resumes), failed (not requeued), given-up (failed too often), ended (by SLURM) or resumes
# (requeued, or by the next job of a chain).
finish() {
    say "$3"
    note "$1" "$3"
    hook "$1"
    exit "$2"
}

# Like finish, for a start that may not write to RUN. The run is another's, so only the log and the hook hear of it.
refuse() {
    say "$2"
    hook refused
    exit "$1"
}

# The site's on_end_hook, in a shell of its own: whatever it does, the job ends as it would without it.
hook() {
    declare -F on_end_hook >/dev/null || return 0
    (trap '' TERM USR1 && exec timeout -s KILL "${HOOK_SECONDS:-20}" bash -c '. "$1" && shift && on_end_hook "$@"' \
        bash "$SITE" "$1" "$(saved_step)" "$RUN" </dev/null) ||
        say "on_end_hook failed with exit status $? (137: it was ended after ${HOOK_SECONDS:-20} s)"
}

# Puts the job back in the queue. In a chain the next job resumes instead.
again() {
    [ "${REQUEUE:-yes}" = yes ] ||
        finish resumes $UNFINISHED "$1; the next job of the chain resumes from step $(saved_step)"
    say "$1; requeued, to resume from step $(saved_step)"
    note resumes "$1; requeued"
    [ -z "$last_resort" ] || kill "$last_resort"
    trap 'interrupted=leaving' TERM
    trap '' USR1
    retried scontrol requeue "$this_job" || finish failed 1 "error: SLURM did not requeue the job"
    hook resumes
    if [ $interrupted != leaving ] && [ "$(job_field JobState)" = RUNNING ]; then
        sleep 60 & # SLURM ends this script
        wait $!
    fi
    exit 1
}

# Why SLURM ends the job, as far as it tells: its state is COMPLETING now, whatever the cause.
cause_of_end() {
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
            echo "the controller does not say why"
        else
            echo "cancelled"
        fi ;;
    esac
}

# What comes after srun has ended with status $1.
decide() {
    local ended state words
    ended=$(word_in "$RUN/run_status.txt")
    # Further lines say why the run failed, and on which rank and host.
    tail -n +2 "$RUN/run_status.txt" 2>/dev/null | while IFS= read -r cause; do say "cause: $cause"; done
    retried test -r "$owner_file" # its file system may be away for a moment
    owned || refuse 1 "another start has taken over; nothing to do"
    case $ended in done | stopped) disown_run ;; esac # the ranks have agreed to end
    [ "$ended" != done ] || finish done 0 "trained to the end"
    state=$(job_field JobState)/$(job_field Reason)
    case $state in
        RUNNING/*) ;;
        */TimeLimit) again "time is up" ;;
        *) finish ended "$1" "ended by SLURM at step $(saved_step): $(cause_of_end "$state")" ;;
    esac
    # Preemption with a grace time: only the tasks are told, and without a requeue the job would be over.
    case $(job_field PreemptTime) in None | '') ;; *) again "preempted" ;; esac
    if [ "$ended" = stopped ]; then
        [ $asked = no ] || again "stopped early"
        finish stopped $UNFINISHED "stopped on request at step $(saved_step); submit_slurm.py --requeue resumes"
    fi
    case $1 in # the exit statuses of pretrain_mesh.py that would come again
        2) finish failed 2 "error: the settings were refused; not requeued" ;;
        4) finish failed 4 "error: the last checkpoint could not be saved; not requeued" ;;
        5) finish failed 5 "error: the loss diverged; not requeued" ;;
    esac
    words="failed with exit status $1"
    note failed "$words"
    stuck_at "$(saved_step)" || again "$words"
    # Whatever the ranks said: the run is not complete.
    finish given-up $(($1 ? $1 : 1)) "error: $words; the restart brought no new step, so this was the last one"
}

main() {
    local from=0 origin
    trap on_warning USR1
    trap on_end TERM
    mkdir -p "$RUN/slurm"
    touch "$RUN/slurm/starts.txt"
    prepare
    take_over
    if [ "$(word_in "$RUN/run_status.txt")" = done ]; then
        disown_run
        finish done 0 "was trained to the end before"
    fi
    # Somebody has submitted this job, and knows how the last one ended.
    if [ "$restarts" = 0 ] && [ "${REQUEUE:-yes}" = yes ] && [ -s "$RUN/slurm/starts.txt" ]; then
        echo "by-hand -" >>"$RUN/slurm/starts.txt"
    fi
    [ $asked = no ] || again "stopped before the start"
    from=$(saved_step)
    ! stuck_at "$from" ||
        finish given-up 1 "error: given up: the run failed at step $from again and again; submit_slurm.py --requeue tries once more"
    rm -f "$RUN/run_status.txt" "$RUN/stop"
    owned || refuse 1 "another start has taken over; nothing to do"
    origin="from step $from"
    [ "$from" != 0 ] || [ -z "${LOAD:-}" ] || origin="from the checkpoint in $LOAD"
    say "start on $SLURM_JOB_NODELIST $origin"
    note start "on $SLURM_JOB_NODELIST $origin"
    train
    decide $?
}

. "$here/environment.sh"
trap 'asked=yes' USR1 # main has more to do for it
identify
forget_another_job
. "$SITE"
[ -z "${SLURM_HET_SIZE:-}" ] || refuse 2 \
    "error: a heterogeneous job ($SLURM_HET_SIZE parts) cannot hold a run; submit one part, with nodes that are alike"
main
