#!/usr/bin/env bash
# ViT-L/14 on 8 nodes of 8 GPUs, or on what is left of them:
#
#   sbatch slurm/pretrain_64gpu.sh [--data.path SHARDS] [--setting value ...]
#
# Partition, account, container and paths: slurm/site.env.example. To chain jobs beyond a site's time limit:
#   sbatch --dependency=singleton slurm/pretrain_64gpu.sh        as often as wanted; they leave once the run is DONE
#
# No --ntasks-per-node: SLURM would keep the tasks of the first start, and a requeued job wait for all of its nodes.
# launch.sh starts one task a GPU.
#
#SBATCH --job-name=megaregion-vit-l14
#SBATCH --nodes=4-8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%x-%j.log
exec bash "${MEGAREGION_HOME:-${SLURM_SUBMIT_DIR:-$PWD}}/slurm/launch.sh" configs/vit_l14_64gpu.yaml "$@"
