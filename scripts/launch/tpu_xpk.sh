#!/usr/bin/env bash
# Train on TPU slices of a GKE cluster with xpk (https://github.com/AI-Hypercomputer/xpk).
#
#   CLUSTER=my-cluster TPU_TYPE=v5p-1024 SLICES=2 IMAGE=REGION-docker.pkg.dev/PROJECT/tessera:latest \
#       scripts/launch/tpu_xpk.sh --config=configs/pods.py:dense_7b --config.plan="dcn.dp=2, fsdp=512" \
#       --workdir=/mnt/runs/dense
#
# The workdir must be on storage that the pods mount. With several slices the plan says what crosses between them: the
# `dcn.` sizes must multiply to SLICES.
set -euo pipefail
: "${CLUSTER:?name of the GKE cluster}" "${TPU_TYPE:?such as v5p-1024}" "${IMAGE:?container with the project in /tessera}"
arguments=$(printf '%q ' "$@")
xpk workload create \
    --cluster="$CLUSTER" \
    --workload="${NAME:-tessera-$(date +%m%d-%H%M)}" \
    --tpu-type="$TPU_TYPE" \
    --num-slices="${SLICES:-1}" \
    --docker-image="$IMAGE" \
    --max-restarts="${RESTARTS:-10}" \
    --command="cd /tessera && export LIBTPU_INIT_ARGS=\"\$(python -m sharding.multihost.xla_flags tpu)\" && \
        python scripts/train.py $arguments --coordinator=auto --silence_seconds=60"
