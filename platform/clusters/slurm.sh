#!/bin/bash
# One sweep as a Slurm job: Ray over its nodes, the first of which also schedules. `medssl cluster render slurm` prints this
# file. Submit it as often as the sweep may need its time limit: jobs of one name run one after another, each goes on where
# the last one ended, and one that finds nothing left to do ends at once.
#
{{submit}}
#
# The folders of data and runs are shared by the nodes (MEDSSL_DATA, MEDSSL_RUNS as they are when you submit).
{{directives}}
set -euo pipefail
{{prepare}}
export OMP_NUM_THREADS={{cpus}} RAY_USAGE_STATS_ENABLED=0
export MEDSSL_DATA=$(realpath "${MEDSSL_DATA:-data}")
{{scratch}}
head=$(hostname)
port=$((20000 + SLURM_JOB_ID % 20000))
ray start --head --node-ip-address="$head" --port=$port --include-dashboard=false --num-cpus={{cpus}} --num-gpus={{gpus}}
trap 'ray stop' EXIT
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 --exclude="$head" \
        ray start --address="$head:$port" --num-cpus={{cpus}} --num-gpus={{gpus}} --block &
    until [ "$(python -c "import ray; ray.init('$head:$port', logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))")" -ge "$SLURM_JOB_NUM_NODES" ]; do
        sleep 2
    done
fi
{{command}} --address "$head:$port"
