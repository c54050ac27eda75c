"""What the plots have in common: their colours, and how they are written."""
import os

import matplotlib
matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402
from cycler import cycler  # noqa: E402

from caffe_proto import UserError  # noqa: E402

# The palette of Okabe and Ito without its yellow, too light for lines: who
# cannot tell red from green tells these apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9",
           "#000000")
plt.rcParams["axes.prop_cycle"] = cycler(color=COLOURS)


def shortened(text, most=60):
    """text, or the end of it: of a path, that is the file."""
    return text if len(text) <= most else "..." + text[3 - most:]


def save(figure, path):
    """Writes a figure and says where: without an ending it is a PNG."""
    if not os.path.splitext(path)[1]:
        path += ".png"
    try:
        figure.savefig(path, dpi=100)
    except (OSError, ValueError) as error:
        raise UserError("cannot write %s: %s" % (
            path, getattr(error, "strerror", None) or error))
    plt.close(figure)
    print("plot: %s" % path)
