"""Child processes that end with this one, at a deadline or on a signal."""
import ctypes
import os
import signal
import subprocess
import time

_PR_SET_PDEATHSIG = 1
_LIBC = ctypes.CDLL(None)


class OutOfTime(Exception):
    """The call has come to its limit, or was asked to end."""


class Limit:
    """The time that this call has."""

    def __init__(self, seconds):
        self.seconds = seconds
        self.begin = time.monotonic()
        self.signal = None

    def heed_signals(self):
        """Lets a signal bring the end forward."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, self._ask)

    def _ask(self, number, _frame):
        self.signal = number

    def left(self):
        """Seconds, or 0 where it is over."""
        if self.signal is not None:
            return 0.0
        return max(0.0, self.begin + self.seconds - time.monotonic())

    def why(self):
        """What has ended the call."""
        if self.signal is None:
            return "at its limit of %d s" % self.seconds
        return "by %s" % signal.Signals(self.signal).name


def start(command, log, env, cwd):
    """Starts a command with its output at the end of the file log."""
    parent = os.getpid()

    def end_with_parent():
        # What kill -9 does to this process, it does to the child.
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGKILL)

    with open(log, "ab") as file:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file,
                                stderr=subprocess.STDOUT, env=env, cwd=cwd,
                                start_new_session=True,
                                preexec_fn=end_with_parent)


def ask_to_end(process, number):
    """Sends a signal to a process and to what it has started."""
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass


def end(processes, number, grace):
    """Ends processes by a signal, and after grace seconds by force."""
    for process in processes:
        ask_to_end(process, number)
    until = time.monotonic() + grace
    for process in processes:
        try:
            process.wait(max(0.0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            ask_to_end(process, signal.SIGKILL)
            process.wait()


def run(command, log, limit, env, cwd, watch=None):
    """Runs a command to its end; returns its exit status.

    Raises OutOfTime, with the command ended, where the limit comes first.
    watch is called now and then while the command runs.
    """
    process = start(command, log, env, cwd)
    try:
        while limit.left() > 0:
            try:
                return process.wait(min(0.2, limit.left()))
            except subprocess.TimeoutExpired:
                if watch:
                    watch()
        raise OutOfTime()
    finally:
        if process.poll() is None:
            end([process], signal.SIGTERM, 3)


def output(command, env=None, timeout=60):
    """What a short command prints; None where it fails or is not there."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL,
                              stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              env=env, timeout=timeout,
                              universal_newlines=True)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
