#!/usr/bin/env bash
# ViT-B/16 on one node of 8 GPUs:
#
#   sbatch slurm/pretrain_8gpu.sh [--data.path SHARDS] [--setting value ...]
#
# Partition, account, container and paths: slurm/site.env.example. To chain jobs beyond a site's time limit:
#   sbatch --dependency=singleton slurm/pretrain_8gpu.sh        as often as wanted; they leave once the run is DONE
#
#SBATCH --job-name=megaregion-vit-b16
#SBATCH --nodes=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
exec bash "${MEGAREGION_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/launch.sh" configs/vit_b16_8gpu.yaml "$@"
