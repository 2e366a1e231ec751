#!/bin/bash
# One sweep as a Slurm job: Ray over its nodes, the first of which also schedules. `medssl cluster render slurm` prints this
# file. Submit it as often as the sweep may need its time limit: jobs of one name run one after another, each goes on where
# the last one ended, and one that finds nothing left to do ends at once.
#
{{submit}}
#
# The folders of data and runs are shared by the nodes (MEDSSL_DATA, MEDSSL_RUNS as they are when you submit).
{{directives}}
{{prepare}}
set -euo pipefail
# a folder of this job: others may not write where Ray's usual one lies when another user was first
export RAY_USAGE_STATS_ENABLED=0 RAY_TMPDIR=/tmp/medssl-$SLURM_JOB_ID
export MEDSSL_DATA=$(realpath "${MEDSSL_DATA:-data}")
{{scratch}}
head=$(hostname -I | cut -d' ' -f1)
port=$((20000 + SLURM_JOB_ID % 20000))
# Ray ends with the job, by Slurm; `ray stop` would also end that of your other jobs on this node
ray start --head --node-ip-address="$head" --port=$port --include-dashboard=false --num-cpus={{cpus}} --num-gpus={{gpus}}
if [ "$SLURM_JOB_NUM_NODES" -gt 1 ]; then
    srun --nodes=$((SLURM_JOB_NUM_NODES - 1)) --ntasks-per-node=1 --cpus-per-task={{cpus}} --exclude="$SLURMD_NODENAME" \
        ray start --address="$head:$port" --num-cpus={{cpus}} --num-gpus={{gpus}} --block &
    for _ in $(seq 100); do # some minutes; then with the nodes that came
        up=$(python -c "import ray; ray.init('$head:$port', logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))")
        [ "$up" -lt "$SLURM_JOB_NUM_NODES" ] || break
        sleep 2
    done
fi
{{command}}
