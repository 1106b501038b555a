#!/usr/bin/env bash
# A recipe on Slurm: one Ray node per machine, the job on the first of them, all of it gone at the end.
#
#   sbatch --nodes=4 --gpus-per-node=8 cluster/launcher/slurm.sh f2llm-v2-8b /shared/runs/f2llm-v2
#
# The environment (.venv) and the root must be on storage that all machines share. A job that ran out of time goes on where it
# ended when it is submitted again.
#SBATCH --job-name=f2llm-ray
#SBATCH --ntasks-per-node=1
#SBATCH --exclusive
#SBATCH --time=24:00:00
set -euo pipefail

recipe=${1:?usage: sbatch slurm.sh RECIPE ROOT}
root=${2:?usage: sbatch slurm.sh RECIPE ROOT}
port=${RAY_PORT:-6379}

umask 077
RAY_AUTH_TOKEN=$(python -c 'import secrets; print(secrets.token_hex(32))')
export RAY_AUTH_TOKEN RAY_AUTH_MODE=token # other users of these machines must not reach Ray

mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${nodes[0]}
address=$(srun --nodes=1 --ntasks=1 --nodelist="$head" hostname --ip-address | awk '{print $1}'):$port

srun --nodes=1 --ntasks=1 --nodelist="$head" \
  ray start --head --block --port="$port" --dashboard-host=127.0.0.1 &
sleep 20
if ((${#nodes[@]} > 1)); then
  srun --nodes=$((${#nodes[@]} - 1)) --ntasks=$((${#nodes[@]} - 1)) --exclude="$head" \
    ray start --address="$address" --block &
  sleep 20
fi
srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" \
  env RAY_ADDRESS="$address" python jobs/pipeline.py --recipe "$recipe" --root "$root"
