#!/usr/bin/env bash
# Trains on Google Kubernetes Engine as a JobSet, on TPU slices or on NVIDIA nodes.
#
#   launch/gke.sh RECIPE --on v5p:4x4x4 --image IMAGE (--bucket BUCKET | --claim PVC | --xpk CLUSTER)
#                 [--dry-run] [--name NAME] [--slices 1] [--spot] [--restarts 50] [--secret dppo]
#                 [-- options of `dppo train`]
#
# --on is written as for `dppo plan`: v4, v5p, 7x, v5e, v6e with a topology; a100, h100, h200 with a
# number of GPUs. The run goes to NAME in a Cloud Storage bucket (by the cluster's FUSE driver; give it
# a hierarchical namespace, which renames a checkpoint's folder at once, and let the pods' service
# account write it), or in a claim that many pods can mount: the pods' /runs. What a recipe reads lies
# there too: -- --gin.DATA_DIR=/runs/data --gin.HF_DIR=/runs/MODEL. A preempted or failed run starts
# again from its newest checkpoint, one with bad input does not; the same command goes on with one
# that has ended. Between GPU nodes NCCL has what the cluster gives its pods: without Google's
# networking for that machine type, plain TCP. Tokens come from a Kubernetes Secret, where there is one:
#
#   printf 'HF_TOKEN=%s\n' "$HF_TOKEN" | kubectl create secret generic dppo --from-env-file=/dev/stdin
#
# --dry-run prints the YAML. `kubectl delete jobset NAME` ends the run behind a checkpoint. --xpk submits
# a workload of xpk's instead: its pods get no Secret, and keep the run in what the cluster mounts:
#
#   xpk storage attach runs --cluster CLUSTER --type gcsfuse --bucket BUCKET --size 1000 \
#     --mount-point /runs --auto-mount true --readonly false
set -euo pipefail
# shellcheck source-path=SCRIPTDIR
source "$(dirname "${BASH_SOURCE[0]}")/pods.sh"

recipe='' on='' image='' bucket='' claim='' name='' slices=1 spot='' restarts=50 secret=dppo
cluster='' options=()
while (($#)); do
  case $1 in
  --on) need "$@" && on=$2 && shift ;;
  --image) need "$@" && image=$2 && shift ;;
  --bucket) need "$@" && bucket=$2 && shift ;;
  --claim) need "$@" && claim=$2 && shift ;;
  --name) need "$@" && name=$2 && shift ;;
  --slices) need "$@" && slices=$2 && shift ;;
  --restarts) need "$@" && restarts=$2 && shift ;;
  --secret) need "$@" && secret=$2 && shift ;;
  --xpk) need "$@" && cluster=$2 && shift ;;
  --spot) spot=yes ;;
  --dry-run) dry=yes ;;
  --help) usage ;;
  --) shift && options=("$@") && break ;;
  -*) fail "unknown option $1 (--help shows them; options of dppo train follow a --)" ;;
  *) [[ ! $recipe ]] || fail "one recipe, not $recipe and $1" && recipe=$1 ;;
  esac
  shift
done
[[ $recipe ]] || fail "give a recipe (--help shows how)"
[[ $on && $image ]] || fail "give --on and --image"
[[ $image =~ ^[A-Za-z0-9./:@_-]+$ ]] || fail "--image '$image' is no name of an image"
check_recipe_of_image "$recipe"
check_number --slices "$slices"
check_number --restarts "$restarts"
check_no_secret "${options[@]+"${options[@]}"}"
for option in "${options[@]+"${options[@]}"}"; do
  [[ ! ${option//[$'\n\t']/} =~ [[:cntrl:]] ]] || fail "an option holds a control character: $option"
done
hardware "$on"
name=${name:-$(basename "$recipe" .gin | tr '[:upper:]_.' '[:lower:]--' | cut -c1-40)}
check_name "$name"
check_name "$secret"
case ${bucket:+b}${claim:+c}${cluster:+x} in
b | c) check_program kubectl ;;
x) check_program xpk ;;
'') fail "give --bucket or --claim, where the run is kept" ;;
*x) fail "--xpk keeps the run in what its cluster mounts at /runs (--help): no --bucket or --claim" ;;
*) fail "--bucket or --claim, not both" ;;
esac
[[ ${bucket:-a} =~ ^[a-z0-9][a-z0-9._-]*$ ]] || fail "--bucket '$bucket': its name, without gs://"
[[ ${claim:-a} =~ ^[a-z0-9][a-z0-9.-]*$ ]] || fail "--claim '$claim' is no name of a claim"

command=(dppo train "$recipe" --workdir "/runs/$name" "${patience[@]}")
command+=("${options[@]+"${options[@]}"}")
shell=$(pod_shell "/runs/$name")

if [[ $cluster ]]; then
  type=$(accelerator_type)
  run xpk workload create --cluster "$cluster" --workload "$name" --num-slices "$slices" \
    --tpu-type "$type" --docker-image "$image" ${spot:+--spot} --env JAX_PLATFORMS=tpu,cpu \
    --max-restarts "$restarts" --restart-on-exit-codes 1,75 \
    --termination-grace-period-seconds 300 \
    --command "bash -c $(printf '%q ' "$shell" bash "${command[@]}")"
  exit
fi

quoted() { # a YAML string of any printable text, lines and tabs: JSON's
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  echo "\"${text//$'\t'/\\t}\""
}

arguments() {
  local argument
  for argument in "$shell" bash "${command[@]}"; do echo "              - $(quoted "$argument")"; done
}

machines() {
  local processes=$((hosts * slices))
  case $kind in
  v4) accelerator=tpu-v4-podslice ;;
  v5e) accelerator=tpu-v5-lite-podslice ;;
  v5p) accelerator=tpu-v5p-slice ;;
  v6e) accelerator=tpu-v6e-slice ;;
  7x) accelerator=tpu7x ;;
  a100) accelerator=nvidia-a100-80gb ;;
  h100) accelerator=nvidia-h100-80gb ;;
  h200) accelerator=nvidia-h200-141gb ;;
  b200) accelerator=nvidia-b200 ;;
  esac
  resource=google.com/tpu selector="cloud.google.com/gke-tpu-accelerator: $accelerator
              cloud.google.com/gke-tpu-topology: $topology"
  # On TPUs JAX finds the others by what GKE tells each pod. A pod without its chips must fail.
  platforms=tpu,cpu environment='' memory=''
  if [[ $accelerator == nvidia-* ]]; then
    ((slices == 1)) || fail "--slices is of TPUs: ask for more GPUs with --on $kind:N"
    resource=nvidia.com/gpu selector="cloud.google.com/gke-accelerator: $accelerator"
    platforms=cuda,cpu
    # NCCL shares more between GPUs than the 64 MB that a container has.
    memory="
            - name: memory
              emptyDir: {medium: Memory}"
    environment="
              - {name: DPPO_COORDINATOR, value: $(quoted "$name-workers-0-0.$name:8476")}
              - {name: DPPO_PROCESSES, value: \"$processes\"}
              - name: DPPO_PROCESS_ID
                valueFrom:
                  fieldRef:
                    fieldPath: \"metadata.annotations['batch.kubernetes.io/job-completion-index']\""
  fi
  environment+="
              - {name: JAX_PLATFORMS, value: $(quoted "$platforms")}"
  [[ ! $spot ]] || selector+="
              cloud.google.com/gke-spot: \"true\""
  for variable in "${secrets[@]}"; do
    environment+="
              - name: $variable
                valueFrom: {secretKeyRef: {name: $secret, key: $variable, optional: true}}"
  done
  fuse='gke-gcsfuse/volumes: "false"' volume="persistentVolumeClaim: {claimName: $(quoted "$claim")}"
  if [[ $bucket ]]; then
    # Checkpoints pass through the sidecar, whose own limits are 256 MiB of memory and 5 GiB of disk.
    fuse='gke-gcsfuse/volumes: "true"
              gke-gcsfuse/cpu-limit: "0"
              gke-gcsfuse/memory-limit: "0"
              gke-gcsfuse/ephemeral-storage-limit: "0"'
    volume="csi:
                driver: gcsfuse.csi.storage.gke.io
                volumeAttributes: {bucketName: $(quoted "$bucket"), mountOptions: implicit-dirs}"
  fi
}

jobset() {
  machines
  cat <<END
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
    - {name: badInput, action: FailJobSet, onJobFailureReasons: [PodFailurePolicy]}
  replicatedJobs:
  - name: workers
    replicas: $slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {containerName: dppo, operator: In, values: [2]}
        template:
          metadata:
            annotations:
              $fuse
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300
            nodeSelector:
              ${selector}
            containers:
            - name: dppo
              image: $(quoted "$image")
              command: [bash, -c]
              args:
$(arguments)
              env:${environment}
              resources:
                limits: {$resource: $per_host}
              volumeMounts:
              - {name: runs, mountPath: /runs}${memory:+
              - {name: memory, mountPath: /dev/shm\}}
            volumes:
            - name: runs
              $volume$memory
END
}

# A JobSet that has ended would stay as it is.
ended=(kubectl get jobset "$name" --ignore-not-found -o 'jsonpath={.status.terminalState}')
if [[ $dry ]]; then
  echo "# kubectl delete jobset $name, if it has ended; then kubectl apply -f -"
  jobset
else
  [[ ! $("${ended[@]}") ]] || kubectl delete jobset "$name"
  jobset | kubectl apply -f -
fi
