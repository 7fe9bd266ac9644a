#!/bin/bash
# Training on two machines: the same command on both.
#
#     recipes/launch/two_nodes.sh HEAD RUN.yaml [KEY=VALUE ...]
#
# HEAD: name or address of one of them, which the other can reach on port 29500 and above. RUN.yaml, the data, the model
# and `out` are on a file system that both have.
set -euo pipefail
head=${1:?usage: two_nodes.sh HEAD RUN.yaml [KEY=VALUE ...]}
shift
exec torchrun --nnodes=2 --nproc-per-node="${NPROC_PER_NODE:-gpu}" \
    --rdzv-backend=c10d --rdzv-endpoint="$head:29500" --rdzv-id="${RUN_ID:-preceptor}" \
    -m preceptor train -- "$@"
