#!/bin/bash
# A recipe on several nodes of Slurm. Edit the lines for your cluster, then: sbatch recipes/cluster/slurm.sh recipes/base
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=TERM@120
#SBATCH --open-mode=append
set -e
export NUM_MACHINES=$SLURM_NNODES MASTER_ADDR=$(hostname) MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-0} # 1 for nodes without internet, after `run --download` on the login node
# `exec`, so that the runner gets the signal: it saves, and the same command resumes when the job is queued again.
exec python -m pipeline run "$1" --plain --num_processes $((8 * SLURM_NNODES)) --launcher "srun --kill-on-bad-exit" "${@:2}"
