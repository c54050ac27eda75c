#!/usr/bin/env bash
# Trains the paper's net for MNIST: see train_paper.sh.
name=mnist solver=mnist_solver.prototxt shape=(1 28 28) get=mnist/create_mnist.sh
# shellcheck source=SCRIPTDIR/../train_paper.sh
. "$(dirname "${BASH_SOURCE[0]}")/../train_paper.sh"
