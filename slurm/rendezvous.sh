# shellcheck shell=bash
# Where the ranks of a job find each other; launch.sh and curate.sh source it.

address_of() {
  local found
  found=$(getent ahostsv4 "$1" | awk 'NR == 1 {print $1}' || true)
  if [[ -z $found ]]; then
    found=$(scontrol --oneliner show node "$1" | grep -o ' NodeAddr=[^ ]*' | cut -d= -f2)
  fi
  echo "$found"
}

# A port of this start's own: a task of the last start may still hold the old one.
port_of() {
  local port=$((20000 + (SLURM_JOB_ID * 31 + ${SLURM_RESTART_COUNT:-0} * 7) % 10000))
  while (exec 3<>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; do port=$((port + 1)); done
  echo "$port"
}

# Ranks meet at the first node of the job.
meet() {
  MASTER_ADDR=$(address_of "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)")
  MASTER_PORT=$(port_of)
  export MASTER_ADDR MASTER_PORT
}
