#!/usr/bin/env bash
# A run on all hosts of a Cloud TPU slice, by gcloud. Needs gcloud, and a disk that the hosts share
# (Filestore, by NFS): workdirs are local folders. Not tried on a TPU by us; DRY_RUN=1 prints every
# command in place of running it.
#
#   export NAME=my-pod ZONE=us-west4-a TYPE=v5litepod-256 NFS=10.0.0.2:/share
#   launch/tpu_pod.sh create             ask for the slice, and wait until it is there
#   launch/tpu_pod.sh install            this folder and its packages on all hosts, the disk mounted
#   launch/tpu_pod.sh train --config=configs/llama3_8b.py --workdir=/shared/runs/8b \
#       --config.mesh.fsdp=256           starts again by itself when it fails or a host comes back
#   launch/tpu_pod.sh logs               what each host says, as it comes
#   launch/tpu_pod.sh stop               SIGTERM: the step is finished and saved
#   launch/tpu_pod.sh delete             the slice; what is on the shared disk stays
#
# PYTHON names the hosts' interpreter, 3.11 or later (python3 by itself), RUNTIME another image, SPOT=1
# asks for a slice that may be taken away: create it again then, and the same `train` goes on.
set -euo pipefail
PYTHON=${PYTHON:-python3}

usage() {
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//;p}' "$0" >&2
    exit 2
}

need() {
    local variable
    for variable in "$@"; do
        if [[ -z ${!variable:-} ]]; then
            echo "error: $variable is not set; allowed: export $variable=…, see $0" >&2
            exit 1
        fi
    done
}

# Runs a command, or prints it so that a shell would read it again.
run() {
    if [[ -n ${DRY_RUN:-} ]]; then
        printf '%q ' "$@"
        printf '\n'
    else
        "$@"
    fi
}

runtime() {
    case $TYPE in
        v4-*) echo tpu-ubuntu2204-base ;;
        v5litepod-*) echo v2-alpha-tpuv5-lite ;;
        v5p-*) echo v2-alpha-tpuv5 ;;
        v6e-*) echo v2-alpha-tpuv6e ;;
        *)
            echo "error: TYPE=$TYPE; allowed: v4-N, v5litepod-N, v5p-N, v6e-N, or set RUNTIME" >&2
            return 1
            ;;
    esac
}

on_all_hosts() {
    run gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

create() {
    need NAME ZONE TYPE
    local version=${RUNTIME:-}
    [[ -n $version ]] || version=$(runtime)
    local spot=()
    [[ -z ${SPOT:-} ]] || spot=(--spot)
    run gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
        --accelerator-type="$TYPE" --runtime-version="$version" "${spot[@]}"
    local describe=(gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE"
        '--format=value(state.state)')
    if [[ -n ${DRY_RUN:-} ]]; then
        run "${describe[@]}"
        return
    fi
    local state
    until [[ ${state:=$("${describe[@]}")} == ACTIVE ]]; do
        if [[ $state == FAILED || $state == SUSPENDED ]]; then
            echo "error: the slice is $state; allowed: delete it and create another" >&2
            exit 1
        fi
        echo "$state" >&2
        sleep 30
        state=
    done
}

install() {
    need NAME ZONE NFS
    run gcloud compute tpus tpu-vm scp --recurse "$(pwd)" "$NAME:jaxlm" --zone="$ZONE" --worker=all
    on_all_hosts "sudo mkdir -p /shared && (mountpoint -q /shared || sudo mount -t nfs $NFS /shared)"
    on_all_hosts "cd jaxlm && $PYTHON -m pip install -e '.[tpu]' -c constraints.txt"
}

train() {
    need NAME ZONE
    (($#)) || usage
    local arguments
    printf -v arguments '%q ' "$@"
    # The last line of the loop: a stop by SIGTERM ends with status 0, a crash or a lost host does
    # not, and then the same command goes on from the newest good checkpoint.
    local loop="until $PYTHON -m launch.train --distributed $arguments; do sleep 20; done"
    local cache=JAX_COMPILATION_CACHE_DIR=/shared/compiled
    on_all_hosts "cd jaxlm && $cache nohup bash -c $(printf '%q' "$loop") > train.log 2>&1 &"
}

logs() {
    need NAME ZONE
    on_all_hosts "tail -n 100 -f jaxlm/train.log"
}

stop() {
    need NAME ZONE
    # To one is to all: they stop after the same step.
    on_all_hosts "pkill -TERM -f '[-]m launch.train' || true"
}

delete() {
    need NAME ZONE
    run gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
}

case ${1:-} in
    create | install | logs | stop | delete)
        (($# == 1)) || usage
        "$1"
        ;;
    train)
        shift
        train "$@"
        ;;
    *) usage ;;
esac
