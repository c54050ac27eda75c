#!/usr/bin/env bash
# Trains the paper's net for CIFAR-10: see train_paper.sh.
name=cifar10 solver=cifar_solver.prototxt shape=(3 32 32) get=cifar10/get_cifar10.sh
# shellcheck source=SCRIPTDIR/../train_paper.sh
. "$(dirname "${BASH_SOURCE[0]}")/../train_paper.sh"
