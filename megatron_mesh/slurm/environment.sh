# Removes variables that leak into a job from the shell that submitted it. job.sh sources this before the site file.

# Variables of a run in the submitting shell, and options for SLURM's commands.
unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT \
    ${!SQUEUE_*} ${!SCANCEL_*} ${!SINFO_*} ${!SCONTROL_*}

# Sets this_job, restarts and token from SLURM's record of this job. The environment may hold array, restart and
# heterogeneous variables of another job inside which this one was submitted, so it is used only if the controller
# doesn't answer. An element of an array is named ARRAY_INDEX, since the last element's SLURM_JOB_ID is the number of
# the whole array.
identify() {
    local record
    record=$(retried scontrol -o show job "$SLURM_JOB_ID" 2>/dev/null | grep -m 1 "^JobId=$SLURM_JOB_ID ")
    if [ -n "$record" ]; then
        [[ $record == *" ArrayTaskId="* ]] || unset ${!SLURM_ARRAY_*}
        [[ $record == *" HetJobId="* ]] || unset ${!SLURM_HET_*}
        SLURM_RESTART_COUNT=$(grep -oPm 1 '(?<= Restarts=)\d+' <<<"$record")
        export SLURM_RESTART_COUNT
    fi
    this_job=$SLURM_JOB_ID restarts=${SLURM_RESTART_COUNT:-0}
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || this_job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    token=$this_job.$restarts
}

# Whether an #SBATCH line of this job's script sets the option that belongs to variable $1.
script_sets() {
    local option
    case $1 in
        SLURM_DIST*) option='--distribution|-m.*' ;;
        SLURM_THREADS_PER_CORE) option='--threads-per-core|--hint' ;;
        SLURM_GPUS) option='--gpus|-G.*' ;;
        SLURM_OVERCOMMIT) option='--overcommit|-O.*' ;;
        *) option=${1#SLURM_} option=--${option,,} option=${option//_/-} ;;
    esac
    grep -qE "^#SBATCH.* ($option)([= ]|\$)" "${BASH_SOURCE[-1]}"
}

# sbatch passes on the variables of the shell that calls it. If that shell is inside another job (srun, salloc or a
# batch script), it has variables that srun would take as options here. A batch script never has or needs the first
# group below. The second group may come from this job's own options. Those variables stay only if an #SBATCH line
# sets them, because otherwise they cannot be distinguished from an outer job's.
drop_outer_job_variables() {
    local name inside=${SLURM_SRUN_COMM_PORT:-${SLURM_STEP_LAUNCHER_PORT:-}} leaked=() unclear=()
    for name in $(compgen -e); do
        case $name in
            SLURM_STEP_* | SLURM_STEPID | SLURM_SRUN_* | SLURM_LAUNCH_* | SLURM_*_GROUP_[0-9]*) leaked+=("$name") ;;
            SLURM_CPU_BIND* | SLURM_MEM_BIND* | SLURM_MEM_PER_* | SLURM_EXPORT_ENV | SRUN_* | SBATCH_*)
                leaked+=("$name") ;;
            SLURM_DISTRIBUTION | SLURM_DIST_PLANESIZE | SLURM_HINT | SLURM_THREADS_PER_CORE | SLURM_OVERCOMMIT | \
                SLURM_NTASKS_PER_[CGST]* | SLURM_CPUS_PER_GPU | SLURM_GPUS | SLURM_GPUS_PER_[ST]* | \
                SLURM_GPU_* | SLURM_EXACT | SLURM_EXCLUSIVE | SLURM_OVERLAP | SLURM_WHOLE | SLURM_RESV_PORTS | \
                SLURM_MPI_TYPE)
                script_sets "$name" || unclear+=("$name") ;;
        esac
    done
    [ ${#leaked[@]} = 0 ] || unset "${leaked[@]}"
    [ ${#unclear[@]} = 0 ] || unset "${unclear[@]}"
    # Without --ntasks, sbatch leaves the outer job's number of tasks in place.
    if [ -n "${SLURM_NTASKS_PER_NODE:-}" ] && script_sets SLURM_NTASKS_PER_NODE; then
        export SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE))
        export SLURM_NPROCS=$SLURM_NTASKS
    fi
    if [ -n "$inside" ]; then
        log_line "submitted from inside another job; ignoring its variables: ${leaked[*]} ${unclear[*]}"
    elif [ ${#unclear[@]} != 0 ]; then
        log_line "ignored, because no #SBATCH line of this job's script sets them: ${unclear[*]}"
    fi
}
