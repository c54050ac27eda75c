"""How many samples a net trains on, for epochs."""
import caffe_proto
import lmdb_file
from caffe_proto import UserError


def list_lines(path):
    """The lines of the list file at path."""
    try:
        with open(path, "rb") as file:
            return sum(1 for line in file if line.strip())
    except OSError as error:
        raise UserError("%s: %s" % (path, error.strerror))


class Data:
    """What a net trains on.

    source is as the net names it, batch the samples of a forward pass;
    samples is None where nothing tells how many there are, and why says so.
    """

    def __init__(self, source, batch, samples, why=""):
        self.source, self.batch = source, batch
        self.samples, self.why = samples, why

    def epochs(self, iteration, iter_size):
        """The epochs that are behind the solver then, or None."""
        if self.samples is None:
            return None
        return iteration * iter_size * self.batch / self.samples


def count(pb, layer):
    """(source, batch size, samples) of a data layer, the latter a function."""
    if layer.type == "ImageData":
        param = layer.image_data_param
        return param.source, param.batch_size, list_lines
    param = layer.data_param
    if param.backend == pb.DataParameter.LMDB:
        return param.source, param.batch_size, lmdb_file.entries

    def unknown(path):
        raise UserError("a LevelDB does not tell its size")
    return param.source, param.batch_size, unknown


def training_data(pb, net):
    """The Data of a net, or None where it has no such layer."""
    for layer in net.layer:
        if (layer.type not in ("Data", "ImageData")
                or not caffe_proto.in_phase(pb, net, layer, pb.TRAIN)):
            continue
        source, batch, samples = count(pb, layer)
        path = caffe_proto.found(source)
        if not path:
            return Data(source, batch, None, "%s is not there" % source)
        try:
            found = samples(path)
        except UserError as error:
            return Data(source, batch, None, str(error))
        if found == 0 or batch == 0:
            return Data(source, batch, None, "%s has %d samples, a batch %d"
                        % (source, found, batch))
        return Data(source, batch, found)
    return None
