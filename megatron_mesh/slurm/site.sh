# The site file: what differs from cluster to cluster. Copy it, fill it in, and use the copy for all of your jobs.
# bash reads it both on the login node (submit_slurm.py) and in the batch script.

# sbatch options for every job: partition, account, quality of service, constraints.
# Quote values as in any bash array: --comment="two words".
SBATCH_OPTIONS=(--partition=gpu)

GPUS_PER_NODE=8
CPUS_PER_TASK=8            # per GPU: the training process, its data-loader workers and its checkpoint writer
TIME_LIMIT=24:00:00

# The longest time that saving a checkpoint may take, in seconds; "submit_slurm.py --status" shows the measured time.
# Jobs are asked to stop 2 x SAVE_SECONDS + 60 s before their time limit.
SAVE_SECONDS=60

# Give up a run that has failed this often at the same step. Preemptions and lost nodes don't count.
FAILURES_PER_STEP=2

# Where Python comes from: venv, pyxis (SLURM's container plugin) or apptainer.
ENVIRONMENT=venv
PYTHON=$HOME/megatron_mesh/.venv/bin/python     # venv: its path. Containers: python, or a path inside.
CONTAINER=                                      # pyxis: image or .sqsh file. apptainer: .sif file.
CONTAINER_MOUNTS=()                             # directories to mount besides the run, the code and $PWD

# Runs before training starts: export variables, load modules. Set MASTER_ADDR here if the first node's name does not
# resolve, or if the fast network knows the node under another name.
prepare() {
    export OMP_NUM_THREADS=1
    # module load cuda/12.8
    # export NCCL_SOCKET_IFNAME=ib0
}

# Called with EVENT STEP RUN when a start of a job ends, for example to send mail. It is killed after 20 s.
# examples/slurm/README.md lists the events.
# on_end_hook() {
#     echo "$3: $1 at step $2" | mail -s "$1: $(basename "$3")" "$USER"
# }
