"""Caffe's protobuf messages, and what a solver's schedules mean."""
import contextlib
import ctypes
import importlib
import math
import os
import subprocess
import sys
import tempfile
import warnings

# The largest m that the layer takes.
MAX_MARGIN = 1000
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


class UserError(Exception):
    """A mistake in the input; the message says what to do."""


@contextlib.contextmanager
def user_errors(stopped="stopped"):
    """Ends the program with one line where its user can help.

    A UserError's, or stopped at Ctrl-C; with none where the reader of a pipe
    has gone.
    """
    try:
        try:
            yield
        finally:
            sys.stdout.flush()
    except UserError as error:
        sys.exit("error: %s" % error)
    except KeyboardInterrupt:
        sys.exit(stopped)
    except BrokenPipeError:
        # `| head` has seen enough. At its end Python would flush once more.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _hook(kind, error, trace, shown=sys.excepthook):
    """Makes one word of a Ctrl-C, too, that comes while modules load."""
    if issubclass(kind, KeyboardInterrupt):
        print("stopped", file=sys.stderr)
    else:
        shown(kind, error, trace)


sys.excepthook = _hook


def found(path, *more):
    """Where Caffe finds a path of a prototxt, or None.

    It takes one from the folder that it runs in, which is the project's root
    for the examples; more are other folders to look in.
    """
    places = [os.path.join(base, path) for base in ("", ROOT, *more)]
    return next((place for place in places if os.path.exists(place)), None)


def caffe_root():
    """The folder of the Caffe with the plugin."""
    return os.path.abspath(os.environ.get("CAFFE_ROOT")
                           or os.path.join(ROOT, "build", "caffe"))


def compile_proto(source, folder):
    """Makes caffe_pb2.py in folder from the caffe.proto at source."""
    try:
        done = subprocess.run(
            ["protoc", "--proto_path=" + os.path.dirname(source),
             "--python_out=" + folder, source],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    except OSError as error:
        raise UserError("cannot run protoc: %s" % error.strerror)
    if done.returncode:
        raise UserError("protoc: " + done.stdout.strip())


def import_from(folder):
    """The module caffe_pb2 in folder, which does not stay on the path."""
    sys.path.insert(0, folder)
    try:
        return importlib.import_module("caffe_pb2")
    except ImportError as error:
        raise UserError("cannot load %s/caffe_pb2.py: %s" % (folder, error))
    finally:
        sys.path.remove(folder)


def load():
    """The module caffe_pb2 of the patched Caffe.

    It is imported by itself: the whole of pycaffe takes a second to load and
    initialises logging. Where pycaffe is not built (Make builds it apart from
    Caffe), it is made from caffe.proto, and nothing is left of that.
    """
    root = caffe_root()
    folder = os.path.join(root, "python", "caffe", "proto")
    source = os.path.join(root, "src", "caffe", "proto", "caffe.proto")
    if os.path.exists(os.path.join(folder, "caffe_pb2.py")):
        module = import_from(folder)
    elif os.path.exists(source):
        with tempfile.TemporaryDirectory() as made:
            compile_proto(source, made)
            module = import_from(made)
    else:
        raise UserError("no Caffe in %s: run cmake/build_caffe.sh, or set "
                        "CAFFE_ROOT to a Caffe with the plugin" % root)
    if not hasattr(module, "LargeMarginInnerProductParameter"):
        raise UserError("the Caffe in %s has no LargeMarginInnerProduct: run "
                        "caffe_patch/apply.sh on it and build it again"
                        % root)
    return module


def read_text(path, message):
    """Fills message from the prototxt at path."""
    from google.protobuf import text_format
    try:
        with open(path) as file:
            text_format.Parse(file.read(), message)
    except OSError as error:
        raise UserError("cannot read %s: %s" % (path, error.strerror))
    except UnicodeDecodeError:
        raise UserError("%s is no prototxt: it is no text" % path)
    except text_format.ParseError as error:
        raise UserError("%s:%s" % (path, error))
    return message


def read_binary(path, message, kind):
    """Fills message from the binary file at path, a file of that kind."""
    from google.protobuf.message import DecodeError
    try:
        # Of some files that are no message, some versions only warn.
        with open(path, "rb") as file, \
                warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            message.ParseFromString(file.read())
        broken = any(issubclass(one.category, RuntimeWarning) for one in told)
    except OSError as error:
        raise UserError("cannot read %s: %s" % (path, error.strerror))
    except DecodeError:
        broken = True
    if broken:
        raise UserError("%s is cut short, or no %s" % (path, kind))
    return message


def check_upgraded(net, path):
    """Raises UserError where a net is in the format of before 2015."""
    if net.layers:
        raise UserError("%s is in the format of before 2015 (layers { ... }): "
                        "upgrade it with Caffe's build/tools/"
                        "upgrade_net_proto_text" % path)


def read_net(pb, path):
    """The NetParameter at path."""
    try:
        net = read_text(path, pb.NetParameter())
    except UserError:
        try:
            read_text(path, pb.SolverParameter())
        except UserError:
            pass
        else:
            raise UserError("%s is a solver: give a net, such as the one that "
                            "it names" % path)
        raise
    check_upgraded(net, path)
    return net


def read_solver(pb, path):
    """The SolverParameter at path and its NetParameter."""
    try:
        solver = read_text(path, pb.SolverParameter())
    except UserError:
        try:
            net = read_text(path, pb.NetParameter())
        except UserError:
            net = None
        if net is None or not (net.layer or net.layers):
            raise
        raise UserError("%s is a net: give its solver, the prototxt with the "
                        "line  net: \"%s\"" % (path, path))
    if solver.HasField("net_param"):
        return solver, solver.net_param
    if solver.HasField("train_net_param"):
        return solver, solver.train_net_param
    name = solver.net or solver.train_net
    if not name:
        raise UserError("%s names no net" % path)
    net = found(name)
    if net:
        return solver, read_text(net, pb.NetParameter())
    raise UserError("%s names the net %s, which is not there: run this in the "
                    "folder that Caffe runs in" % (path, name))


def meets(rule, state):
    """Whether Caffe holds a NetState to meet a NetStateRule."""
    return ((not rule.HasField("phase") or rule.phase == state.phase)
            and (not rule.HasField("min_level")
                 or state.level >= rule.min_level)
            and (not rule.HasField("max_level")
                 or state.level <= rule.max_level)
            and all(stage in state.stage for stage in rule.stage)
            and not any(stage in state.stage for stage in rule.not_stage))


def in_phase(pb, net, layer, phase):
    """Whether Caffe keeps layer in that phase of net.

    To Caffe, a layer's own `phase` is no rule: it is what a net was dumped in.
    """
    state = pb.NetState()
    state.CopyFrom(net.state)
    state.phase = phase
    if layer.include:
        return any(meets(rule, state) for rule in layer.include)
    return not any(meets(rule, state) for rule in layer.exclude)


# What a learning rate is made of besides base_lr.
POLICIES = {"fixed": (), "step": ("gamma",), "exp": ("gamma",),
            "inv": ("gamma", "power"), "multistep": ("gamma",),
            "poly": ("power",), "sigmoid": ("gamma",)}


def check_solver(solver, path):
    """Raises UserError where the schedule of the solver means nothing."""
    if solver.max_iter < 1:
        raise UserError("%s: max_iter is %d" % (path, solver.max_iter))
    if solver.iter_size < 1:
        raise UserError("%s: iter_size is %d" % (path, solver.iter_size))
    if solver.lr_policy in ("step", "sigmoid") and solver.stepsize < 1:
        raise UserError("%s: lr_policy \"%s\" needs a stepsize above 0"
                        % (path, solver.lr_policy))
    if solver.lr_policy not in POLICIES:
        raise UserError("%s: lr_policy \"%s\" is none of Caffe's"
                        % (path, solver.lr_policy))
    for field in ("base_lr",) + POLICIES[solver.lr_policy]:
        value = getattr(solver, field)
        # Of these, only power may be below 0.
        if not (math.isfinite(value) and (field == "power" or value >= 0)):
            raise UserError("%s: %s is %g" % (path, field, value))


def check_schedule(name, param):
    """Raises UserError where the descent of lambda means nothing."""
    for field in ("base", "gamma", "power", "lambda_min", "iteration"):
        value = getattr(param, field)
        if not 0 <= value < math.inf:
            raise UserError("layer %s: largemargin_inner_product_param.%s is "
                            "%g: it must be finite and at least 0"
                            % (name, field, value))
    if param.HasField("margin") and not 1 <= param.margin <= MAX_MARGIN:
        raise UserError("layer %s: largemargin_inner_product_param.margin is "
                        "%d: it must be from 1 to %d"
                        % (name, param.margin, MAX_MARGIN))


def power(x, exponent):
    """The pow of C for an x of at least 0: Python's own does not overflow."""
    try:
        return x ** exponent
    except OverflowError:
        return math.inf


def steps(solver):
    """The iterations at which "multistep" lets the learning rate drop.

    Caffe takes the values in their order, and one an iteration.
    """
    taken = []
    for value in solver.stepvalue:
        taken.append(max([value] + [step + 1 for step in taken[-1:]]))
    return taken


def learning_rate(solver, iteration):
    """The learning rate of the solver in that iteration (from 0).

    Where the schedule overflows it is inf or 0, as in Caffe.
    """
    base, gamma = solver.base_lr, solver.gamma
    policy = solver.lr_policy
    if policy == "fixed":
        rate = base
    elif policy == "step":
        rate = base * power(gamma, iteration // solver.stepsize)
    elif policy == "exp":
        rate = base * power(gamma, iteration)
    elif policy == "inv":
        rate = base * power(1 + gamma * iteration, -solver.power)
    elif policy == "multistep":
        rate = base * power(gamma, sum(step <= iteration
                                       for step in steps(solver)))
    elif policy == "poly":
        rate = base * power(1 - iteration / solver.max_iter, solver.power)
    else:  # "sigmoid"
        rate = base / (1 + power(math.e,
                                 -gamma * (iteration - solver.stepsize)))
    # Caffe's is a float.
    return ctypes.c_float(rate).value


def drops(solver):
    """The iterations at which the learning rate steps down."""
    if solver.lr_policy == "step":
        return range(solver.stepsize, solver.max_iter, solver.stepsize)
    if solver.lr_policy == "multistep":
        return [step for step in steps(solver) if 0 < step < solver.max_iter]
    return []


def first_drop(solver):
    """The iteration of the first step down of the learning rate, or None."""
    found = drops(solver)
    return found[0] if found else None


def margin(param):
    """m of a LargeMarginInnerProductParameter."""
    return param.margin if param.HasField("margin") else param.type + 1


def lambda_after(param, passes):
    """lambda after that many forward passes."""
    return max(param.lambda_min,
               param.base * (1 + param.gamma * passes) ** -param.power)


def lambda_at(param, iteration, iter_size=1):
    """lambda as Caffe's log shows it for that iteration of the solver."""
    return lambda_after(param, param.iteration + (iteration + 1) * iter_size)
