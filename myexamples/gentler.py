"""Makes of a training that went wrong one with a gentler descent of lambda."""
import os
import re
import shlex

import caffe_proto
import snapshots
from caffe_proto import UserError

# A descent is slowed down by this factor at least, and so that lambda comes
# down to 1 no sooner than after this share of the iterations: the examples'
# nets, which learn, take 0.15 to 0.33.
SLOWER, SHARE = 4, 0.15
# Where there is no descent to slow down.
BASE, POWER = 1000, 3


def option(command, name):
    """The value of an option in gflags' manner, or None; the last counts."""
    value = None
    for i, word in enumerate(command):
        match = re.fullmatch(r"--?%s(?:=(.*))?" % name, word, re.S)
        if match and match[1] is not None:
            value = match[1]
        elif match and i + 1 < len(command):
            value = command[i + 1]
    return value


def without(command, name):
    """The command without an option."""
    kept, skip = [], False
    for word in command:
        match = re.fullmatch(r"--?%s(=.*)?" % name, word, re.S)
        if match or skip:
            skip = bool(match) and match[1] is None and not skip
            continue
        kept.append(word)
    return kept


def iteration_of(state):
    """The iteration that the name of a solver state tells, or None."""
    match = re.search(r"_iter_(\d+)\.solverstate(\.h5)?$", state)
    return int(match[1]) if match else None


def is_whole(pb, state):
    """Whether a solver state and its model are there and not cut short."""
    try:
        snapshots.check_state(pb, state)
        return True
    except UserError:
        return False


def last_good(pb, states, good):
    """The last whole state of an iteration that was good, or None."""
    found = [(iteration_of(state), state) for state in states
             if iteration_of(state) is not None and good is not None
             and iteration_of(state) <= good]
    for _, state in sorted(found, reverse=True):
        if is_whole(pb, state):
            return state
    return None


def slow_down(param, passes):
    """Gives a layer a gentler descent in a training of so many passes; says
    what changed, or nothing where it has no margin."""
    if caffe_proto.margin(param) == 1:
        return ""
    before = {field: getattr(param, field)
              for field in ("base", "gamma", "power")}
    # Without a descent, or with one from below 1, there is nothing to slow.
    if param.base <= 1 or param.gamma == 0 or param.power == 0:
        param.base = max(param.base * 10, BASE)
        param.power = param.power if param.power > 1 else POWER
        param.gamma = float("inf")
    # Where lambda passes 1: base (1 + gamma SHARE passes)^-power = 1.
    latest = (param.base ** (1 / param.power) - 1) / (SHARE * passes)
    param.gamma = float("%.3g" % min(param.gamma / SLOWER, latest))
    return ", ".join(
        "%s: %.6g (was %.6g)" % (field, getattr(param, field), value)
        for field, value in before.items()
        if getattr(param, field) != value)


def free_path(path):
    """path, or where that is taken one with a number."""
    stem, ending = os.path.splitext(path)
    number = 1
    while os.path.lexists(path):
        number += 1
        path = "%s_%d%s" % (stem, number, ending)
    return path


def write(path, message):
    """Writes a prototxt that was not there."""
    from google.protobuf import text_format
    try:
        with open(path, "x") as file:
            file.write(text_format.MessageToString(message))
    except OSError as error:
        raise UserError("cannot write %s: %s" % (path, error.strerror))


def make(pb, solver_path, cause):
    """Writes a gentler solver and net beside the solver's snapshots; returns
    the solver's path and what changed, a line each. cause is an alarm's."""
    solver, net = caffe_proto.read_solver(pb, solver_path)
    changes = []
    passes = solver.max_iter * max(1, solver.iter_size)
    for layer in net.layer:
        if layer.type == "LargeMarginInnerProduct" and caffe_proto.in_phase(
                pb, net, layer, pb.TRAIN):
            param = layer.largemargin_inner_product_param
            change = slow_down(param, passes)
            if change:
                changes.append("layer '%s': %s" % (layer.name, change))
    if cause != "descent":
        before = solver.base_lr
        solver.base_lr = float("%.3g" % (before / 10))
        changes.append("base_lr: %.6g (was %.6g)" % (solver.base_lr, before))
    prefix = solver.snapshot_prefix or os.path.splitext(solver_path)[0]
    if os.path.isdir(prefix):
        prefix = os.path.join(prefix, "")
    # Snapshots of its own: none of the first training's is overwritten.
    solver.snapshot_prefix = prefix + "_gentler"
    made = []
    if solver.net or solver.train_net:
        made.append(free_path(prefix + "_gentler_net.prototxt"))
        write(made[0], net)
        field = "net" if solver.net else "train_net"
        setattr(solver, field, made[0])
    made.append(free_path(prefix + "_gentler_solver.prototxt"))
    write(made[-1], solver)
    return made[-1], ["made %s" % " and ".join(made)] + changes


def advice(command, alarm, states):
    """The last lines after a stop by alarm: from which of states, those that
    the log tells of, to go on and by which command."""
    try:
        pb = caffe_proto.load()
        state = last_good(pb, states, alarm.good)
        solver, lines = make(pb, option(command, "solver"), alarm.cause)
    except UserError as error:
        return "stopped; no gentler solver could be made: %s" % error
    command = without(without(command, "solver"), "snapshot")
    command.append("--solver=" + solver)
    if state:
        head = "the last good snapshot is %s" % state
        command = without(command, "weights")
        command.append("--snapshot=" + state)
        then = "go on from there"
    else:
        head = "no snapshot is from before the trouble"
        then = "start again"
    return "\n".join(["stopped: " + head] + lines + [
        "%s with a gentler descent by" % then, "  " + shlex.join(command)])
