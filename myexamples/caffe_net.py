"""Nets of the built Caffe, in a process of their own.

Caffe ends the process in which a net is wrong. Here that becomes a UserError
with Caffe's words.
"""
import ctypes
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import subprocess
import sys
import tempfile

from caffe_proto import UserError, caffe_root


_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)
ABOUT = "about: "
_log = None


def end_with(parent):
    """Has this process end when its parent does, whatever ends that."""
    _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def guard():
    """Goes on in a child process. Where Caffe ends that, UserError in this.

    For programs that run pycaffe themselves. What C++ logs is kept for the
    error, and not shown.
    """
    global _log
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    log = tempfile.TemporaryFile()
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        # At Ctrl-C the parent has the last word.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        end_with(parent)
        sys.stderr = open(os.dup(2), "w", buffering=1)
        os.dup2(log.fileno(), 2)
        os.environ.update(GLOG_logtostderr="1", GLOG_minloglevel="0")
        _log = log
        return
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))
    log.seek(0)
    raise UserError(last_words(log.read().decode(errors="replace")))


def about(text):
    """Says what Caffe is given next, a file or an option: if the process ends
    with that, the error begins so."""
    if _log:
        os.write(_log.fileno(), ("\n%s%s\n" % (ABOUT, text)).encode())


class Caffe:
    """A process with pycaffe, started when it is first needed."""

    def __init__(self):
        self.process = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        if self.process:
            self.connection.close()
            self.process.wait()
            self.log.close()
            self.process = None

    def start(self):
        root = caffe_root()
        if not os.path.exists(os.path.join(root, "python/caffe/_caffe.so")):
            raise UserError("no built pycaffe in %s: run cmake/build_caffe.sh, "
                            "or set CAFFE_ROOT to a Caffe with the plugin"
                            % root)
        self.connection, theirs = multiprocessing.Pipe()
        self.log = tempfile.TemporaryFile()
        path = [os.path.join(root, "python")] + [
            part for part in [os.environ.get("PYTHONPATH")] if part]
        env = dict(os.environ, GLOG_logtostderr="1", GLOG_minloglevel="0",
                   PYTHONPATH=os.pathsep.join(path))
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, os.path.abspath(__file__),
                 str(theirs.fileno())], pass_fds=[theirs.fileno()], env=env,
                stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log)

    def call(self, function, *args):
        """What a function of this file returns in the process."""
        if self.process is None:
            self.start()
        try:
            self.connection.send((function, args))
            answer = self.connection.recv()
        except (EOFError, OSError):
            self.process.wait()
            self.log.seek(0)
            words = self.log.read().decode(errors="replace")
            self.close()
            raise UserError(last_words(words)) from None
        except BaseException:
            self.process.kill()
            self.close()
            raise
        if isinstance(answer, UserError):
            raise answer
        return answer

    def shapes(self, net):
        """Of the TEST net in a prototxt: the shapes of its parameters, a dict
        of layers to lists, and of its blobs, a dict."""
        return self.call("shapes", net)

    def data_shapes(self, net, folder):
        """The shapes of a net's blobs, whose data are named from a folder."""
        return self.call("data_shapes", net, folder)

    def images(self, net, folder, top, count):
        """The first blobs `top` of a net with an ImageData layer."""
        return self.call("images", net, folder, top, count)

    def outputs(self, net, model, inputs, names):
        """Blobs of the TEST net in a prototxt with the weights of a model.

        inputs is a list of dicts of arrays; so is what is returned, with
        `names`.
        """
        return self.call("outputs", net, model, inputs, names)


def last_words(log):
    """Why Caffe ended, from its log."""
    fatal = re.search(r"^F\d{4,8} \S+ +\d+ \S+\] (.*)$", log, re.M)
    told = re.findall("^%s(.*)$" % ABOUT, log, re.M)
    head = told[-1] + ": " if told else ""
    if fatal:
        # Behind a net that is whole, it is of none of its layers.
        begun = log[:fatal.start()].split("] Network initialization done")[-1]
        layers = re.findall(r"\] (?:Creating Layer|Setting up) (.*)$", begun,
                            re.M)
        return "%sCaffe says%s: %s" % (
            head, " of layer '%s'" % layers[-1] if layers else "",
            fatal[1].strip())
    lines = [line for line in log.splitlines() if line.strip()]
    return "%spycaffe ended%s" % (head, ": " + lines[-1] if lines else "")


# ---- In the process ----

def open_net(text, model=None):
    import caffe
    with tempfile.NamedTemporaryFile("w", suffix=".prototxt") as file:
        file.write(text)
        file.flush()
        net = caffe.Net(file.name, caffe.TEST)
    if model is not None:
        net.copy_from(model)
    return net


def shapes(text):
    net = open_net(text)
    return ({name: [tuple(blob.data.shape) for blob in blobs]
             for name, blobs in net.params.items()}, blob_shapes(net))


def blob_shapes(net):
    return {name: tuple(blob.data.shape) for name, blob in net.blobs.items()}


def data_shapes(text, folder):
    before = os.getcwd()
    os.chdir(folder)
    try:
        return blob_shapes(open_net(text))
    finally:
        os.chdir(before)


def images(text, folder, top, count):
    before = os.getcwd()
    os.chdir(folder)
    try:
        net = open_net(text)
        found = []
        for _ in range(count):
            net.forward()
            found.append(net.blobs[top].data.copy())
        return found
    finally:
        os.chdir(before)


def outputs(text, model, inputs, names):
    net = open_net(text, model)
    found = []
    for arrays in inputs:
        for name, array in arrays.items():
            net.blobs[name].data[...] = array
        net.forward()
        found.append({name: net.blobs[name].data.copy() for name in names})
    return found


def serve(connection):
    import caffe  # noqa: F401  so that it is the first to fail
    while True:
        try:
            function, args = connection.recv()
        except EOFError:
            return
        try:
            answer = globals()[function](*args)
        except Exception as error:
            answer = UserError("pycaffe: %s" % error)
        connection.send(answer)


if __name__ == "__main__":
    # The class as the other side knows it is caffe_proto's, not __main__'s.
    serve(multiprocessing.connection.Connection(int(sys.argv[1])))
