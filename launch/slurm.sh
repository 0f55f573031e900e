#!/usr/bin/env bash
#SBATCH --job-name=jaxlm
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --requeue
#SBATCH --signal=TERM@120
# A run on the nodes of a SLURM job, one process a node, which SLURM tells apart:
#
#   sbatch --nodes=4 launch/slurm.sh --config=configs/small.py --workdir=/shared/runs/mine
#
# Two minutes before the job's time is over it gets SIGTERM: the step is finished and saved, and the
# same command goes on. DRY_RUN=1 prints the command. Not tried on a cluster by us.
set -euo pipefail

if (($# == 0)); then
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
fi
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$HOME/.cache/jaxlm/compiled}
command=(srun --kill-on-bad-exit=1 python -m launch.train --distributed "$@")
if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' "${command[@]}"
    printf '\n'
else
    exec "${command[@]}"
fi
