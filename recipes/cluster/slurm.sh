#!/bin/bash
# A recipe on several nodes of Slurm. Edit the lines for your cluster, then: sbatch recipes/cluster/slurm.sh recipes/base
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --signal=B:TERM@120
#SBATCH --open-mode=append
export NUM_MACHINES=$SLURM_NNODES MASTER_ADDR=$(hostname) MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # which srun does not take over
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-0} # 1 for nodes without internet, after `run --download` on the login node
python -m pipeline run "$1" --plain --num_processes $((SLURM_GPUS_ON_NODE * SLURM_NNODES)) \
  --launcher "srun --kill-on-bad-exit" "${@:2}" &
runner=$!
# The signal goes to what srun started, which saves, or to a step on this node. (srun itself would kill at a signal.)
trap 'pgrep -P $runner -x srun > /dev/null && scancel --signal=TERM $SLURM_JOB_ID || kill -TERM $runner' TERM
wait $runner
code=$?
while kill -0 $runner 2> /dev/null; do wait $runner; code=$?; done # a signal ends only the first wait
# The same command resumes when the job is queued again; one that the user has cancelled is not.
[ $code = 143 ] && [ "$(squeue --noheader --jobs=$SLURM_JOB_ID --format=%T)" = RUNNING ] && scontrol requeue $SLURM_JOB_ID
exit $code
