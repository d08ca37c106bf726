# What differs from cluster to cluster. Copy this file, fill it in, and keep it: all of your jobs source it.
# bash reads it on the login node (tools/submit_slurm.py) and in the batch script.

# Options of sbatch for every job: partition, account, quality of service, constraints.
# Quote values as in any bash array: --comment="two words".
SBATCH_OPTIONS=(--partition=gpu)

GPUS_PER_NODE=8
CPUS_PER_TASK=8            # of each GPU's process: its own thread, data-loader workers, the checkpoint writer
TIME_LIMIT=24:00:00

# Longest time that saving a checkpoint takes, in seconds. "submit_slurm.py --status" shows the measured one.
# The job is told to stop this early before its time limit: twice this, and a minute.
SAVE_SECONDS=60

# Times that a run may fail at the same step before it is given up. Preemptions and lost nodes do not count.
FAILURES_PER_STEP=2

# Where python comes from: venv, pyxis (containers by SLURM's plugin) or apptainer.
ENVIRONMENT=venv
PYTHON=$HOME/megatron_mesh/.venv/bin/python     # venv: by path. Containers: python, or a path inside.
CONTAINER=                                      # pyxis: image or .sqsh file. apptainer: .sif file.
CONTAINER_MOUNTS=()                             # directories that the container sees besides the run and $PWD

# What a job exports or loads before it starts. Set MASTER_ADDR here if the first node's name does not resolve, or
# if another name of it is on the fast network.
prepare() {
    export OMP_NUM_THREADS=1
    # module load cuda/12.8
    # export NCCL_SOCKET_IFNAME=ib0
}

# Called when a start of a job ends, for mail or chat: EVENT STEP RUN. README.md lists the events. It may take 20 s.
# on_end_hook() {
#     echo "$3: $1 at step $2" | mail -s "$1: $(basename "$3")" "$USER"
# }
