#!/usr/bin/env bash
# Trains the paper's net for MNIST; made for a GPU. Options go to `caffe train`
# (--gpu=0, --snapshot=FILE, --weights=FILE).
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

here=$ROOT/myexamples/mnist
"$here/create_mnist.sh"
train_paper "$here/mnist_solver.prototxt" "$here/mnist_snapshot" "$@"
