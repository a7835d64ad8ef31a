#!/bin/bash
# Installs bertjax on a TPU VM: setup_host.sh CHECKOUT MOUNT [BUCKET]
#
# Runs in the home folder, where gcp/tpu.py has put CHECKOUT.tar.gz; again is
# harmless. With BUCKET it is mounted at MOUNT, for workdirs that hosts share.
set -euo pipefail
checkout=$1 mount=$2 bucket=${3:-}
export DEBIAN_FRONTEND=noninteractive

apt_install() {
  # A new machine is still upgrading itself.
  sudo apt-get -o DPkg::Lock::Timeout=600 update -qq
  sudo apt-get -o DPkg::Lock::Timeout=600 install -y -qq "$@"
}

if ! command -v python3.11 > /dev/null; then
  apt_install software-properties-common
  sudo add-apt-repository -y ppa:deadsnakes/ppa
  apt_install python3.11 python3.11-venv
fi

mkdir -p "$checkout"
tar -xzf "$checkout.tar.gz" -C "$checkout"
cd "$checkout"
python3.11 -m venv .venv
.venv/bin/python -m pip install --quiet -e '.[tpu,tfds]'

# JAX warns that a TPU starts and ends slowly without.
echo always | sudo tee /sys/kernel/mm/transparent_hugepage/enabled > /dev/null

if [[ -n $bucket ]] && ! mountpoint -q "$mount"; then
  if ! command -v gcsfuse > /dev/null; then
    key=/usr/share/keyrings/cloud.google.asc
    source=https://packages.cloud.google.com/apt
    curl -fsSL "$source/doc/apt-key.gpg" | sudo tee "$key" > /dev/null
    echo "deb [signed-by=$key] $source gcsfuse-$(lsb_release -cs) main" \
      | sudo tee /etc/apt/sources.list.d/gcsfuse.list > /dev/null
    apt_install gcsfuse
  fi
  sudo mkdir -p "$mount"
  sudo chown "$(id -un)" "$mount"
  # Checkpoints and vocabularies are renamed as folders.
  gcsfuse --implicit-dirs --rename-dir-limit=10000 "${bucket#gs://}" "$mount"
fi
