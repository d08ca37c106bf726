# The environment of a job is its own. job.sh sources this file before the site's.

# What the shell that submitted the job had for a run of its own, and its options for SLURM's commands.
unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT \
    ${!SQUEUE_*} ${!SCANCEL_*} ${!SINFO_*} ${!SCONTROL_*}

# Sets this_job, restarts and token from what the controller says about this job. If the job was submitted inside
# another one, its environment may hold that job's array, restart and heterogeneous variables. The environment
# counts only if the controller doesn't answer. An element of an array acts on itself: SLURM_JOB_ID of the last
# element is the whole array's.
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

# Whether an #SBATCH line of this job's script gives the option that variable $1 stands for.
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

# sbatch passes on the variables of the shell that called it. Inside another job (srun, salloc or a batch script)
# that shell has variables which srun would take for its options here. No batch script has or needs the first group.
# The second group may come from this job's own options. It stays only if an #SBATCH line sets it, since nothing
# else tells an outer job's variables from those of this job's command line.
forget_another_job() {
    local name inside=${SLURM_SRUN_COMM_PORT:-${SLURM_STEP_LAUNCHER_PORT:-}} found=() ours=()
    for name in $(compgen -e); do
        case $name in
            SLURM_STEP_* | SLURM_STEPID | SLURM_SRUN_* | SLURM_LAUNCH_* | SLURM_*_GROUP_[0-9]*) found+=("$name") ;;
            SLURM_CPU_BIND* | SLURM_MEM_BIND* | SLURM_MEM_PER_* | SLURM_EXPORT_ENV | SRUN_* | SBATCH_*)
                found+=("$name") ;;
            SLURM_DISTRIBUTION | SLURM_DIST_PLANESIZE | SLURM_HINT | SLURM_THREADS_PER_CORE | SLURM_OVERCOMMIT | \
                SLURM_NTASKS_PER_[CGST]* | SLURM_CPUS_PER_GPU | SLURM_GPUS | SLURM_GPUS_PER_[ST]* | \
                SLURM_GPU_* | SLURM_EXACT | SLURM_EXCLUSIVE | SLURM_OVERLAP | SLURM_WHOLE | SLURM_RESV_PORTS | \
                SLURM_MPI_TYPE)
                script_sets "$name" || ours+=("$name") ;;
        esac
    done
    [ ${#found[@]} = 0 ] || unset "${found[@]}"
    [ ${#ours[@]} = 0 ] || unset "${ours[@]}"
    # Without --ntasks, sbatch leaves the other job's number.
    if [ -n "${SLURM_NTASKS_PER_NODE:-}" ] && script_sets SLURM_NTASKS_PER_NODE; then
        export SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE))
        export SLURM_NPROCS=$SLURM_NTASKS
    fi
    if [ -n "$inside" ]; then
        say "submitted from inside another job; its variables are not used here: ${found[*]} ${ours[*]}"
    elif [ ${#ours[@]} != 0 ]; then
        say "not used, since no #SBATCH line of this job's script sets them: ${ours[*]}"
    fi
}
