# shellcheck shell=bash
# What differs from site to site, as slurm/site.env says it; launch.sh and curate.sh source it in the folder of this file's
# repository, whose code is what runs, whatever a container has installed.
#
#   python        how Python is started: a program, or several words such as "apptainer exec --nv IMAGE python"
#   srun_options  options of every srun

if [[ -f slurm/site.env ]]; then
  # shellcheck source=slurm/site.env.example
  source slurm/site.env
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

python=("${MEGAREGION_PYTHON:-.venv/bin/python}")
if [[ ! -x ${python[0]} ]]; then read -ra python <<<"${python[0]}"; fi
read -ra srun_options <<<"${MEGAREGION_SRUN:-}"

load_modules() {
  if [[ -n ${MEGAREGION_MODULES:-} ]]; then
    # shellcheck disable=SC2086
    module load $MEGAREGION_MODULES
  fi
}

# A short command beside the ranks; where a container comes with srun, only a step has its Python.
run_python() {
  if ((${#srun_options[@]})); then
    srun --nodes=1 --ntasks=1 "${srun_options[@]}" "${python[@]}" "$@"
  elif ! command -v "${python[0]}" >/dev/null; then
    echo "there is no ${python[0]}; run make .venv/ready here, or name a Python by MEGAREGION_PYTHON in slurm/site.env" >&2
    return 2
  else
    "${python[@]}" "$@"
  fi
}
