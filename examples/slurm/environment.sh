# The environment of a job is its own. job.sh sources this file before the site's.

# What the shell that submitted the job had for a run of its own.
unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT

# sbatch passes on the variables of the shell that called it. Inside another job (srun, salloc) that shell has
# variables which srun would take for its options here. No batch script has or needs the first group by itself.
# The second group may come from this job's own options, so it goes only if there are marks of another srun.
forget_another_job() {
    local name inside=${SLURM_SRUN_COMM_PORT:-${SLURM_STEP_LAUNCHER_PORT:-}} found=()
    for name in $(compgen -e); do
        case $name in
            SLURM_STEP_* | SLURM_STEPID | SLURM_SRUN_* | SLURM_LAUNCH_* | SLURM_*_GROUP_[0-9]*) ;;
            SLURM_CPU_BIND* | SLURM_MEM_BIND* | SLURM_MEM_PER_* | SLURM_EXPORT_ENV | SRUN_* | SBATCH_*) ;;
            SLURM_DISTRIBUTION | SLURM_DIST_PLANESIZE | SLURM_HINT | SLURM_THREADS_PER_CORE | SLURM_OVERCOMMIT | \
                SLURM_NTASKS_PER_[CGST]* | SLURM_CPUS_PER_GPU | SLURM_GPUS | SLURM_GPUS_PER_[ST]* | \
                SLURM_GPU_* | SLURM_EXACT | SLURM_EXCLUSIVE | SLURM_OVERLAP | SLURM_WHOLE | SLURM_RESV_PORTS | SLURM_MPI_TYPE)
                [ -n "$inside" ] || continue ;;
            *) continue ;;
        esac
        unset "$name"
        found+=("$name")
    done
    [ -n "$inside" ] || return 0
    if [ -n "${SLURM_NTASKS_PER_NODE:-}" ]; then # without --ntasks sbatch leaves the other job's number
        export SLURM_NTASKS=$((SLURM_JOB_NUM_NODES * SLURM_NTASKS_PER_NODE))
        export SLURM_NPROCS=$SLURM_NTASKS
    fi
    say "submitted from inside another job; its variables are not used here: ${found[*]}"
}
