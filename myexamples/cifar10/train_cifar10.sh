#!/usr/bin/env bash
# Trains the paper's net for CIFAR-10; made for a GPU.
#
# Usage: myexamples/cifar10/train_cifar10.sh [--cpu] [OPTION...]
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

here=$ROOT/myexamples/cifar10
paper_options "$here/cifar_solver.prototxt" 3 32 32 "$@"
"$here/get_cifar10.sh"
train_paper "$here/cifar_snapshot"
