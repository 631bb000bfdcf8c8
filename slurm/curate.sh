#!/usr/bin/env bash
# Curation on a cluster: every stage a job array, each waiting for the stages that it reads.
#
#   . slurm/site.env && slurm/curate.sh --images FOLDER --out FOLDER [--setting value ...]
#
# Prints the jobs' ids. `tools/curate.py status --out FOLDER` shows how far they are. Stopped, failed, more images?
# The same command again: what is finished is recognised and skipped. The settings are those of tools/curate.py.
#
#   MEGAREGION_SHARES=64                     tasks of an array; the outcome is the same for any number
#   MEGAREGION_CURATE="--cpus-per-task=8"    options of every sbatch; a task uses as many workers as it has CPUs
#   MEGAREGION_CURATE_embed="--gpus=1"       options of one stage's sbatch, after the others; CPUs decode for the GPU
#   MEGAREGION_DECODE_ONCE=1                 one array for propose, ocr and embed, whose networks all run on cores;
#                                            its options are in MEGAREGION_CURATE_propose_ocr_embed
#   MEGAREGION_CURATE_cluster="--ntasks=8 --gpus-per-task=1"    ranks that share k-means, one job
set -euo pipefail

cd "${MEGAREGION_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}"
# shellcheck source=slurm/site.sh
source slurm/site.sh
shares=${MEGAREGION_SHARES:-64}

# The job itself: --job STAGE SHARES, then the settings.
if [[ ${1:-} == --job ]]; then
  stage=$2
  of=$3
  shift 3
  load_modules
  share=()
  if [[ $stage != list ]]; then share=(--piece "${SLURM_ARRAY_TASK_ID:-0}" --of "$of"); fi
  # K-means is one job of as many ranks as it gets tasks.
  if [[ $stage == cluster && ${SLURM_NTASKS:-1} -gt 1 ]]; then
    # shellcheck source=slurm/rendezvous.sh
    source slurm/rendezvous.sh
    meet
    export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
    exec srun --kill-on-bad-exit=1 "${srun_options[@]}" "${python[@]}" tools/curate.py "$@" --stage cluster
  fi
  # A task is one process tree on one node; srun is needed only for what it alone can do, such as containers.
  step=()
  if ((${#srun_options[@]})); then step=(srun --ntasks=1 --kill-on-bad-exit=1 "${srun_options[@]}"); fi
  exec "${step[@]}" "${python[@]}" tools/curate.py --workers "${SLURM_CPUS_PER_TASK:-1}" "$@" \
    --stage "$stage" "${share[@]}"
fi

if [[ " $* " == *" --help "* || " $* " == *" -h "* ]]; then
  run_python tools/curate.py --help
  exit 0
fi

# A mistake in the settings ends here, before anything is submitted.
jobs=$(run_python tools/curate.py "$@" ${MEGAREGION_DECODE_ONCE:+--stage propose+ocr+embed} --jobs)

declare -A ids=()
undo() {
  echo "curate.sh: not all jobs could be submitted; those that were are cancelled" >&2
  if ((${#ids[@]})); then scancel "${ids[@]}"; fi
}
trap undo ERR

# submit STAGE one|many EARLIER,EARLIER
submit() {
  local stage=$1 kind=$2 after='' earlier of=1 log=%x-%j
  local extra=MEGAREGION_CURATE_${stage//[-+]/_} options=()
  # shellcheck disable=SC2206
  options=(${MEGAREGION_CURATE:-} ${!extra:-})
  if [[ $kind == many ]]; then
    of=$shares
    log=%x-%A-%a
    options+=(--array="0-$((shares - 1))")
  fi
  for earlier in ${3//,/ }; do after+=":${ids[$earlier]}"; done
  if [[ -n $after ]]; then options+=(--dependency="afterok$after" --kill-on-invalid-dep=yes); fi
  ids[$stage]=$(sbatch --parsable --job-name="curate-$stage" --requeue --open-mode=append \
    --output="${MEGAREGION_LOGS:-.}/slurm-$log.log" "${options[@]}" slurm/curate.sh \
    --job "$stage" "$of" "${settings[@]}")
  ids[$stage]=${ids[$stage]%%;*}
  echo "$stage ${ids[$stage]}"
}

settings=("$@")
submit list one ""
while read -r stage kind earlier; do
  submit "$stage" "$kind" "$earlier"
done <<<"$jobs"
