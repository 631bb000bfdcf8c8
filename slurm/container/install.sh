#!/usr/bin/env bash
# Puts everything that megaregion runs on into an image of Debian or Ubuntu: packages of the system, and a virtual environment
# in /opt/venv with requirements.txt. The Dockerfile and the Apptainer definition both call it, as root.
#
#   install.sh /opt/megaregion        the folder with requirements.txt
#
# TORCH_INDEX=https://download.pytorch.org/whl/cu128 takes torch from another index, for drivers older than PyPI's build needs.
set -euo pipefail

export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
# gcc, g++, make and Python's headers: Triton and torch.compile build what launches their kernels. libibverbs and librdmacm: NCCL
# and gloo load them for InfiniBand and RoCE. libgomp: faiss.
apt-get install -y -qq --no-install-recommends \
  python3 python3-dev python3-venv gcc g++ make ca-certificates tini \
  libibverbs1 ibverbs-providers librdmacm1 libgomp1 libnuma1
rm -rf /var/lib/apt/lists/*

python3 -m venv /opt/venv
pip=(/opt/venv/bin/python -m pip install --quiet --no-cache-dir --disable-pip-version-check)
torch=$(grep '^torch==' "$1/requirements.txt")
if [[ -n ${TORCH_INDEX:-} ]]; then
  "${pip[@]}" "$torch" --index-url "$TORCH_INDEX"
else
  "${pip[@]}" "$torch"
fi
"${pip[@]}" --requirement "$1/requirements.txt"
# Two OpenCV wheels share one folder: the one with selective search must have written it last.
opencv=$(grep '^opencv-contrib-python-headless==' "$1/requirements.txt")
/opt/venv/bin/python -c 'import cv2; cv2.ximgproc' 2>/dev/null || "${pip[@]}" --no-deps --force-reinstall "$opencv"
# What training and curation import; a library that is missing shows now and not on 64 GPUs.
/opt/venv/bin/python -c 'import cv2, deepspeed, faiss, megatron.core, onnxruntime, torch, transformers, triton, webdataset'
