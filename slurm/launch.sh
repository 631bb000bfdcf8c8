#!/usr/bin/env bash
# Trains inside a SLURM allocation: one task a GPU, saved and requeued on signals, started again after faults.
#
#   slurm/launch.sh CONFIG [--setting value ...]        from a batch script, see pretrain_64gpu.sh
#
# What becomes of a start is read from the exit code of srun:
#   0   trained to the end (or to --stop-at); at the end the run has a DONE marker, jobs that follow leave at once
#   85  saved on a signal (time limit, preemption, a person): requeued
#   2   a mistake in the settings or the data: the job fails, a new start would fail as well
#   86  a newer start owns the run: the job ends and touches nothing
#   any other, such as a dead rank, a watchdog's 87 or an unfit machine's 88: requeued, until starts in a row
#       bring no new checkpoint
# A job is requeued only while SLURM calls it RUNNING, so scancel is final.
set -euo pipefail

if [[ -z ${SLURM_JOB_ID:-} || -z ${1:-} ]]; then
  echo "launch.sh: runs inside a job and needs a config; use sbatch slurm/pretrain_64gpu.sh, or without SLURM torchrun" >&2
  exit 2
fi

cd "${MEGAREGION_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}"
# shellcheck source=slurm/site.sh
source slurm/site.sh
# shellcheck source=slurm/rendezvous.sh
source slurm/rendezvous.sh

config=$1
shift
runs=${MEGAREGION_RUNS:-runs}
name=${MEGAREGION_NAME:-$(basename "$config" .yaml)}
run=$runs/$name
restarts=${SLURM_RESTART_COUNT:-0} # unset at the first start
start=$SLURM_JOB_ID.$restarts
logs=$run/logs/$start
# The machines are looked at by the ranks that will train, before anything is built: seconds, not a start of its own.
look=(--preflight first)
if [[ ${MEGAREGION_PREFLIGHT:-yes} == no ]]; then look=(); fi
train=(tools/pretrain.py "${look[@]}" --config "$config" --output "$runs" --name "$name" "$@")

say() { echo "$(date '+%F %T') $start: $*"; }

stopping=
step=
ask_to_stop() {
  say "SLURM asks to stop (time limit or a person)"
  stopping=yes
  # Without --batch the signal goes to the ranks alone.
  if [[ -n $step ]]; then scancel --signal=USR1 "$SLURM_JOB_ID" || true; fi
}
trap ask_to_stop USR1

job_is_running() { [[ $(scontrol --oneliner show job "$SLURM_JOB_ID") == *" JobState=RUNNING "* ]]; }

requeue() {
  if job_is_running; then
    say "requeued: $*"
    scontrol requeue "$SLURM_JOB_ID"
  else
    say "not requeued, the job was cancelled or SLURM requeues it: $*"
  fi
  exit 0
}

give_up() {
  say "$2"
  exit "$1"
}

# Number of starts in a row, this one included, that failed without a new checkpoint.
count_fault() {
  local file=$run/faults latest count=0 seen=none
  latest=$(cat "$run/checkpoints/latest" 2>/dev/null || echo none)
  if [[ -f $file ]]; then read -r count seen <"$file"; fi
  if [[ $seen != "$latest" ]]; then count=0; fi
  echo "$((count + 1)) $latest" >"$file" || true # a full disk must not end the job
  echo "$((count + 1))"
}

# srun in the background, for bash runs a trap only between commands; wait returns early on a trapped signal.
run_step() {
  srun "${tasks[@]}" "$@" &
  step=$!
  local code=0
  while :; do
    code=0
    wait "$step" || code=$?
    kill -0 "$step" 2>/dev/null || break
  done
  step=
  return "$code"
}

mkdir -p "$logs"
if [[ -f $run/DONE ]]; then
  say "$run is trained to the end already; remove $run/DONE to go on with more train.steps"
  exit 0
fi
load_modules

gpus=${SLURM_GPUS_PER_NODE:-} # 8, or h100:8
per_node=${SLURM_NTASKS_PER_NODE:-${gpus##*:}}
[[ -n $per_node ]] || give_up 2 "set --gpus-per-node (or --ntasks-per-node): one task a GPU"
# Fewer nodes than asked for may be left (--nodes=4-8); the global batch stays, so not every number of them fits.
nodes=$(run_python "${train[@]}" --fit-nodes "$SLURM_JOB_NUM_NODES" --per-node "$per_node") || give_up $? "refused, see above"
tasks=(--nodes="$nodes" --ntasks="$((nodes * per_node))" --ntasks-per-node="$per_node")
# srun takes no --cpus-per-task from sbatch (since SLURM 22.05): a rank and its loader would share one core. Neighbouring
# ranks lie on neighbouring cores, as neighbouring GPUs lie on one socket; every rank sees all GPUs and takes its own.
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then tasks+=(--cpus-per-task="$SLURM_CPUS_PER_TASK"); fi
tasks+=(--cpu-bind=cores --distribution=block:block)
# One dead rank ends the step: without it the others would wait for its part for ever.
tasks+=(--kill-on-bad-exit=1 --wait=60 --output="$logs/rank-%t.out")
tasks+=("${srun_options[@]}")

meet
# A checkpoint belongs to the newest start: a rank that SLURM lost sight of must not publish over it.
export MEGAREGION_FENCE=$start
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# Only what went wrong; INFO writes pages a rank.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}
# Start-up traffic must not go over interfaces that exist on one node only.
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME:-^lo,docker,veth}
# Without this NCCL may keep memory that fragments PyTorch's; its own default differs between versions.
export PYTORCH_CUDA_ALLOC_CONF=${PYTORCH_CUDA_ALLOC_CONF:-expandable_segments:True}
export TOKENIZERS_PARALLELISM=false

say "$nodes of $SLURM_JOB_NUM_NODES nodes x $per_node tasks, ranks meet at $MASTER_ADDR:$MASTER_PORT, logs in $logs"
if [[ -n $stopping ]]; then requeue "asked to stop before training began"; fi

code=0
run_step "${python[@]}" "${train[@]}" --resume auto || code=$?
say "srun ended with $code"
case $code in
  0)
    if [[ -f $run/DONE ]]; then say "$run is trained to the end"; else say "stopped where it was told to"; fi
    ;;
  85)
    requeue "saved on a signal"
    ;;
  2)
    give_up 2 "not requeued, see the last lines of $logs/rank-*.out"
    ;;
  86)
    give_up 86 "a newer start owns $run"
    ;;
  *)
    if [[ -n $stopping ]]; then requeue "asked to stop while the ranks started"; fi
    # If a node is gone, SLURM notices after its own time-out and moves the job by itself; requeued before that,
    # the job would be given the dead node once more.
    sleep "${MEGAREGION_SETTLE:-60}"
    faults=$(count_fault)
    if ((faults >= ${MEGAREGION_MAX_FAULTS:-3})); then
      give_up "$code" "given up after $faults starts without a new checkpoint, see $logs/rank-*.out"
    fi
    requeue "exit code $code, fault $faults without a new checkpoint"
    ;;
esac
