#!/usr/bin/env bash
# Train on every host of a Cloud TPU slice with plain gcloud.
#
#   TPU=my-slice ZONE=us-east5-a scripts/launch/tpu_pod.sh create v5p-1024
#   TPU=my-slice ZONE=us-east5-a REPO=https://... scripts/launch/tpu_pod.sh install
#   TPU=my-slice ZONE=us-east5-a scripts/launch/tpu_pod.sh run --config=configs/pods.py:dense_7b --workdir=/mnt/runs/dense
#   TPU=my-slice ZONE=us-east5-a scripts/launch/tpu_pod.sh stop
#
# The workdir must be on storage that all hosts mount (Filestore, or a bucket through gcsfuse).
# Every host runs the same command; which host it is comes from the machine's metadata. Run the same command again after
# a preemption, or on a slice of another size with another --config.plan, and the run goes on from its last checkpoint.
set -euo pipefail
: "${TPU:?name of the TPU VM}" "${ZONE:?zone of the TPU VM}"

everywhere() {
    gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

action=${1:?create, install, run or stop}
shift
case $action in
    create)
        gcloud compute tpus tpu-vm create "$TPU" --zone="$ZONE" --accelerator-type="${1:?such as v5p-1024}" \
            --version="${RUNTIME:-v2-alpha-tpuv5}"
        ;;
    install)
        everywhere "git clone --depth=1 '${REPO:?git address the hosts clone the project from}' tessera && cd tessera && python3 -m venv .venv &&
            .venv/bin/pip install --quiet -e '.[tpu]'"
        ;;
    run)
        # setsid: a closed connection does not end the run. --silence_seconds: how long a dead host may go unnoticed.
        arguments=$(printf '%q ' "$@")
        everywhere "cd tessera && LIBTPU_INIT_ARGS=\"\$(.venv/bin/python -m sharding.multihost.xla_flags tpu)\" \
            setsid .venv/bin/python scripts/train.py $arguments --coordinator=auto --silence_seconds=60 \
            >>train.log 2>&1 </dev/null & sleep 20; tail -n 5 tessera/train.log"
        ;;
    stop)
        # SIGTERM is the notice of a preemption, too: all hosts agree on a step, save, and end.
        everywhere "pkill -TERM -f scripts/train.py"
        ;;
    *)
        echo "unknown action $action: create, install, run or stop" >&2
        exit 2
        ;;
esac
