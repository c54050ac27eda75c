#!/usr/bin/env bash
# Trains the paper's net for MNIST; made for a GPU.
#
# Usage: myexamples/mnist/train_mnist.sh [--cpu] [OPTION...]
#
#   --cpu            train on the CPU; without it, a Caffe that has no GPU to
#                    use says how long that takes
#   --gpu=0          another GPU, or several (0,1)
#   --snapshot=FILE  go on from a .solverstate of an earlier training
#   --weights=FILE   begin with the weights of a .caffemodel
#
# These and what else there is of options go to `caffe train`.
# shellcheck source=SCRIPTDIR/../common.sh
. "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

here=$ROOT/myexamples/mnist
paper_options "$here/mnist_solver.prototxt" 1 28 28 "$@"
"$here/create_mnist.sh"
train_paper "$here/mnist_snapshot"
