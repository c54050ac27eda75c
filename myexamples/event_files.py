"""Writes the rows of a log as event files, which TensorBoard shows."""
import logging
import os

from caffe_proto import UserError


class EventWriter:
    """Event files in a folder: scalars, and histograms of the angles.

    Where the folder has some already, what they have from the first row on is
    hidden: a training that went on, or a log that is written again.
    """

    def __init__(self, folder):
        try:
            import tensorboardX
        except ImportError as error:
            raise UserError(
                "--tensorboard needs the Python package tensorboardX: %s (in "
                "a virtual environment made with --system-site-packages, pip "
                "install tensorboardX, and run this with its python)" % error)
        # TensorBoard shows NaN; a line of log for each helps nobody.
        logging.getLogger("tensorboardX").setLevel(logging.ERROR)
        self.folder, self._writer = folder, None
        self._make = tensorboardX.SummaryWriter
        try:
            os.makedirs(folder, exist_ok=True)
        except OSError as error:
            raise UserError("cannot make %s: %s" % (folder, error.strerror))
        if not os.access(folder, os.W_OK | os.X_OK):
            raise UserError("cannot write into %s" % folder)

    def add(self, row):
        """Writes a row; it is on the disk afterwards."""
        if not self._writer:
            # Two writers of one second would take the same name.
            self._writer = self._make(
                self.folder, purge_step=row.iteration,
                filename_suffix=".%d" % os.getpid())
        step, at = row.iteration, row.time
        for name, value in row.columns().items():
            if "/angle_decile_" not in name:
                self._writer.add_scalar(name, value, step, at)
        for layer, margin in row.margins.items():
            if margin.get("angle_deciles"):
                self._add_angles("margin/%s/angle" % layer, margin, step, at)
        self._writer.flush()

    def _add_angles(self, name, margin, step, at):
        """A histogram from the deciles: a tenth of the samples in each."""
        deciles, tenth = margin["angle_deciles"], margin["samples"] / 10
        limits, counts, squares = [], [], 0
        for low, high in zip(deciles, deciles[1:]):
            # Edges must rise.
            if limits and high <= limits[-1]:
                counts[-1] += tenth
            else:
                limits.append(high)
                counts.append(tenth)
            squares += tenth * ((low + high) / 2) ** 2
        self._writer.add_histogram_raw(
            name, deciles[0], deciles[-1], margin["samples"],
            margin["samples"] * margin["angle_mean"], squares, limits, counts,
            step, walltime=at)

    def close(self):
        """Returns the folder, or None where no row came."""
        if not self._writer:
            return None
        self._writer.close()
        return self.folder
