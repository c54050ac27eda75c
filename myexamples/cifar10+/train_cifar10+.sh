#!/usr/bin/env bash
# Trains the paper's net for CIFAR-10 with random crops and mirroring; made
# for a GPU. Options go to `caffe train` (--gpu=0, --snapshot=FILE,
# --weights=FILE).
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

here=$ROOT/myexamples/cifar10+
"$ROOT/myexamples/cifar10/get_cifar10.sh"
train_paper "$here/cifar_solver.prototxt" "$here/cifar_snapshot" "$@"
