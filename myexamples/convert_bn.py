#!/usr/bin/python3
"""Converts the batch normalisation of a model to another dialect.

    myexamples/convert_bn.py MODEL OUT --from variance --to inverse-std

MODEL and OUT are .caffemodel or .caffemodel.h5 files, of the same format.
The dialects:

  inverse-std      the layer BN of the L-Softmax authors' Caffe and of this
                   project: slope, bias, moving mean, moving inverse standard
                   deviation, each (1, channels)
  variance         the layer BN of yjxiong's Caffe from 2016 on (TSN,
                   BN-Inception) and of PSPNet's: the fourth blob is the
                   moving variance; (1, channels), later and PSPNet's
                   (1, channels, 1, 1)
  batchnorm-scale  upstream's layers BatchNorm and Scale

Nothing in a model tells the first two apart: a wrong one is read without a
word and gives wrong numbers. Where the values speak against what was asked
for, a warning says so.

eps is part of what is converted. It is --eps, else what --net says, else what
the model itself says, else BN's default, 1e-5.

With batchnorm-scale, the layer that BN 'x' becomes is a BatchNorm 'x' and a
Scale 'x_scale' (--scale-name). The other way, in a .caffemodel or with --net,
the Scale of a BatchNorm is the one that takes its top; without either, it is
found by its name. A BatchNorm without a Scale becomes a BN of slope 1.
"""
import argparse
import os

# First: Ctrl-C is quiet from here on.
import caffe_proto

import numpy as np

import caffe_model
from bn_dialect import EPS, inverse_std, moving_variance, speaks_against, \
    check_statistics
from caffe_proto import UserError, user_errors

DIALECTS = ("inverse-std", "variance", "batchnorm-scale")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("out", metavar="OUT")
    parser.add_argument("--from", dest="source", choices=DIALECTS,
                        required=True, help="what MODEL has")
    parser.add_argument("--to", dest="target", choices=DIALECTS,
                        required=True, help="what OUT shall have")
    parser.add_argument("--net", metavar="NET", help="prototxt of MODEL, for "
                        "eps and to tell which layers are meant")
    parser.add_argument("--eps", type=float, help="of all layers")
    parser.add_argument("--layer", metavar="NAME", action="append",
                        help="convert only this layer (BN's or BatchNorm's "
                        "name); may be repeated; default: all")
    parser.add_argument("--axes", type=int, choices=(2, 4),
                        help="--to variance: 2 for blobs (1, channels), as "
                        "yjxiong's master has them, 4 for (1, channels, 1, "
                        "1), as PSPNet's has them (default: 2)")
    parser.add_argument("--scale-name", metavar="PATTERN",
                        default="{}_scale", help="name of a Scale, {} being "
                        "that of its BatchNorm (default: {}_scale)")
    parser.add_argument("--force", action="store_true",
                        help="replace OUT where it is there")
    args = parser.parse_args(argv)
    if args.source == args.target:
        parser.error("--from and --to are both %s" % args.source)
    if args.eps is not None and not 0 <= args.eps < 1e30:
        parser.error("--eps %g: it must be at least 0 and below 1e30"
                     % args.eps)
    if args.axes and args.target != "variance":
        parser.error("--axes is for --to variance")
    args.axes = args.axes or 2
    if "{}" not in args.scale_name:
        parser.error("--scale-name %s: it has no {} for the name of the "
                     "BatchNorm" % args.scale_name)
    return args


class Found:
    """A batch normalisation in a model: its layers and its numbers.

    layers: the name of the BN, or of the BatchNorm and of the Scale (None
    where there is none). The statistics are kept as an inverse standard
    deviation in double, so that each way goes through one number.
    """

    def __init__(self, layers, eps):
        self.layers, self.eps = layers, eps

    @property
    def name(self):
        return self.layers[0]


# ---- From blobs to numbers ----

def numbers(blobs, count, where):
    """Blobs as flat arrays of double, all of one length."""
    if len(blobs) != count or any(blob is None for blob in blobs):
        raise UserError("%s has %d blobs, not %d"
                        % (where, sum(blob is not None for blob in blobs),
                           count))
    return [np.asarray(blob, np.float64).ravel() for blob in blobs]


def channels_agree(where, arrays):
    sizes = {array.size for array in arrays}
    if len(sizes) > 1 or 0 in sizes:
        raise UserError("%s: its blobs have %s numbers; they must have one "
                        "for each channel" % (where, " and ".join(
                            str(array.size) for array in arrays)))
    for array in arrays:
        check_statistics(where, array)


def read_bn(found, blobs, dialect, path):
    where = "layer '%s' of %s" % (found.name, path)
    found.slope, found.bias, found.mean, fourth = numbers(blobs, 4, where)
    channels_agree(where, [found.slope, found.bias, found.mean, fourth])
    found.fourth = fourth
    found.inv_std = (fourth if dialect == "inverse-std"
                     else inverse_std(where, fourth, found.eps))


def read_batch_norm(found, norm, scale, path):
    where = "layer '%s' of %s" % (found.name, path)
    mean, variance, factor = numbers(norm, 3, where)
    if factor.size != 1:
        raise UserError("%s: its third blob has %d numbers; BatchNorm's has "
                        "one" % (where, factor.size))
    check_statistics(where, factor)
    # As BatchNorm does it: nothing was seen yet where the factor is 0.
    factor = 0 if factor[0] == 0 else 1 / factor[0]
    found.mean, variance = mean * factor, variance * factor
    found.slope, found.bias = np.ones_like(mean), np.zeros_like(mean)
    if scale is not None:
        scaled = "layer '%s' of %s" % (found.layers[1], path)
        read = numbers(scale, len(scale), scaled)
        if not 1 <= len(read) <= 2:
            raise UserError("%s has %d blobs; the Scale of a BatchNorm has 1 "
                            "or 2" % (scaled, len(read)))
        found.slope = read[0]
        if len(read) == 2:
            found.bias = read[1]
    channels_agree(where, [found.slope, found.bias, found.mean, variance])
    found.fourth = variance
    found.inv_std = inverse_std(where, variance, found.eps)


# ---- From numbers to blobs ----

def to_float(found, array):
    with np.errstate(over="ignore"):
        array = np.asarray(array).astype("f4")
    if not np.isfinite(array).all():
        raise UserError("layer '%s': what it becomes does not fit into float"
                        % found.name)
    return array


def bn_blobs(found, dialect, axes):
    """The four blobs of a BN."""
    slope, fourth = found.slope, found.inv_std
    if dialect == "variance":
        fourth, slope = moving_variance(found.inv_std, slope, found.eps)
        if found.source == "batchnorm-scale":
            fourth, slope = found.fourth, found.slope
    shape = (1, -1) + (1,) * (axes - 2)
    return [to_float(found, array).reshape(shape)
            for array in (slope, found.bias, found.mean, fourth)]


def batch_norm_blobs(found):
    """The blobs of a BatchNorm and those of a Scale."""
    variance, slope = moving_variance(found.inv_std, found.slope, found.eps)
    if found.source == "variance":
        variance, slope = found.fourth, found.slope
    return ([to_float(found, found.mean), to_float(found, variance),
             np.ones(1, "f4")],
            [to_float(found, slope), to_float(found, found.bias)])


# ---- Which layers ----

def pairs(layers, path):
    """BatchNorm layers and the Scale of each, or None: a list of names.

    A Scale belongs to a BatchNorm whose top it takes before another layer
    does.
    """
    found, waiting = [], {}
    for layer in layers:
        scales = layer.type == "Scale" and len(layer.bottom) == 1
        for bottom in layer.bottom:
            norm = waiting.pop(bottom, None)
            if norm is None:
                continue
            if scales:
                param = layer.scale_param
                if param.axis != 1 or param.num_axes != 1:
                    raise UserError("layer '%s' of %s scales other axes than "
                                    "the channels" % (layer.name, path))
                norm[1] = layer.name
        if layer.type == "BatchNorm":
            norm = [layer.name, None]
            found.append(norm)
            for top in layer.top:
                waiting[top] = norm
    return found


def eps_of(layer):
    """eps of a BN or BatchNorm, if its parameters say it."""
    param = layer.bn_param if layer.type == "BN" else layer.batch_norm_param
    return param.eps if param.HasField("eps") else None


class Chooser:
    """Which layers of a model are to be converted, and with which eps."""

    def __init__(self, pb, args, model_layers):
        self.args = args
        self.kind = ("BatchNorm" if args.source == "batchnorm-scale"
                     else "BN")
        self.net = None
        if args.net:
            self.net = caffe_proto.read_net(pb, args.net).layer
        self.model_layers = model_layers
        self.eps = {}
        for layers in (model_layers, self.net):
            for layer in layers or ():
                eps = eps_of(layer) if layer.type == self.kind else None
                if eps is not None:
                    self.eps[layer.name] = eps

    def eps_for(self, name):
        return (self.args.eps if self.args.eps is not None
                else self.eps.get(name, EPS))

    def choose(self, weights):
        """A list of Found, without numbers yet."""
        if self.kind == "BN":
            names = [[name] for name in self.bn_names(weights)]
        else:
            names = self.norm_pairs(weights)
        wanted = self.args.layer
        if wanted is not None:
            there = [layers[0] for layers in names]
            for name in wanted:
                if name not in there:
                    raise UserError("%s has no layer '%s' of the type %s%s"
                                    % (self.args.model, name, self.kind,
                                       "; it has %s" % ", ".join(there)
                                       if there else ""))
            names = [layers for layers in names if layers[0] in wanted]
        if not names:
            raise UserError("%s has no %s layer"
                            % (self.args.model, self.kind))
        found = []
        for layers in names:
            one = Found(layers, self.eps_for(layers[0]))
            one.source = self.args.source
            found.append(one)
        return found

    def bn_names(self, weights):
        if self.model_layers is not None:
            return [layer.name for layer in self.model_layers
                    if layer.type == "BN" and layer.name in weights]
        if self.net is not None:
            names = dict.fromkeys(layer.name for layer in self.net
                                  if layer.type == "BN")
            return [name for name in names if name in weights]
        # HDF5 has no types: four blobs of one number for each channel.
        return [name for name, blobs in weights.items()
                if len(blobs) == 4 and None not in map(is_row, blobs)
                and len({blob.shape for blob in blobs}) == 1]

    def norm_pairs(self, weights):
        layers = self.model_layers
        if layers is None or not any(layer.bottom for layer in layers):
            layers = self.net
        if layers is not None:
            unique = []
            for pair in pairs(layers, self.args.net or self.args.model):
                if pair[0] in weights and pair not in unique:
                    unique.append(pair)
            return unique
        found = []
        for name, blobs in weights.items():
            if len(blobs) == 3 and None not in map(is_vector, blobs) and \
                    blobs[2].size == 1:
                scale = self.args.scale_name.format(name)
                found.append([name, scale if scale in weights else None])
        return found


def is_row(blob):
    """True for (1, C) and (1, C, 1, 1), else None."""
    return True if blob is not None and blob.ndim in (2, 4) and \
        blob.shape == (1, blob.size) + (1, 1) * (blob.ndim == 4) else None


def is_vector(blob):
    return True if blob is not None and blob.ndim == 1 else None


# ---- The files ----

def convert(found, weights, args):
    """New blobs for the layers of found: a list of dicts of names to blobs,
    in the order of found."""
    converted = []
    for one in found:
        if args.source == "batchnorm-scale":
            scale = one.layers[1] and weights.get(one.layers[1])
            read_batch_norm(one, weights[one.name], scale or None, args.model)
        else:
            read_bn(one, weights[one.name], args.source, args.model)
        if args.target == "batchnorm-scale":
            norm, scale = batch_norm_blobs(one)
            name = args.scale_name.format(one.name)
            if name in weights:
                raise UserError("%s has a layer '%s' already: name the Scale "
                                "of '%s' by --scale-name"
                                % (args.model, name, one.name))
            converted.append({one.name: norm, name: scale})
        else:
            converted.append({one.name: bn_blobs(one, args.target,
                                                 args.axes)})
    return converted


def new_caffemodel(net, found, converted, args):
    """Changes the layers of a NetParameter."""
    replaced = {one.name: (one, blobs)
                for one, blobs in zip(found, converted)}
    dropped = {one.layers[1] for one in found if len(one.layers) > 1}
    layers = []
    # A Scale that goes hands its top to the BN, where that has none in place.
    tops = {layer.name: list(layer.top) for layer in net.layer}
    for layer in net.layer:
        if layer.name in dropped:
            continue
        if layer.name not in replaced:
            layers.append(layer)
            continue
        one, blobs = replaced[layer.name]
        del layer.blobs[:]
        for blob in blobs[layer.name]:
            caffe_model.set_array(layer.blobs.add(), blob)
        layers.append(layer)
        if args.target == "batchnorm-scale":
            scale = type(layer)(name=list(blobs)[1], type="Scale",
                                bottom=layer.top, top=layer.top)
            scale.scale_param.bias_term = True
            for blob in blobs[scale.name]:
                caffe_model.set_array(scale.blobs.add(), blob)
            layers.append(scale)
            layer.type = "BatchNorm"
            layer.ClearField("bn_param")
            layer.ClearField("param")
            layer.batch_norm_param.eps = one.eps
        else:
            if one.source == "batchnorm-scale":
                layer.ClearField("batch_norm_param")
                layer.ClearField("param")
                if one.layers[1] in tops and tops[one.layers[1]]:
                    layer.ClearField("top")
                    layer.top.extend(tops[one.layers[1]])
            layer.type = "BN"
            layer.bn_param.eps = one.eps
    # Of the same message, so that what it does not know stays, too.
    copies = [type(layer).FromString(layer.SerializeToString())
              for layer in layers]
    del net.layer[:]
    net.layer.extend(copies)
    return net.SerializeToString()


def hdf5_writer(found, converted, args):
    """A function that writes the new HDF5 model to a path."""
    def write(path):
        with open(path, "wb") as file:
            file.write(caffe_model.read_bytes(args.model))
        file, data = caffe_model.open_hdf5(path, "r+")
        with file:
            for one, blobs in zip(found, converted):
                for name in one.layers:
                    if name is not None:
                        del data[name]
                for name, arrays in blobs.items():
                    group = data.create_group(name)
                    for i, array in enumerate(arrays):
                        group[str(i)] = array
    return write


def warn(found, args):
    """Says where the values speak against --from."""
    if args.source == "batchnorm-scale":
        return
    said = speaks_against(args.source, [
        (one.name, one.mean, one.fourth, one.eps) for one in found])
    if said:
        print("warning: is --from %s right? %s" % (args.source, said))


def run(args):
    pb = caffe_proto.load()
    caffe_model.check_free([args.out], args.force)
    if os.path.exists(args.out) and os.path.exists(args.model) and \
            os.path.samefile(args.model, args.out):
        raise UserError("OUT is MODEL, %s: write to another file" % args.out)
    weights = caffe_model.read(pb, args.model)
    net, hdf5 = None, caffe_model.is_hdf5(args.model)
    caffe_model.check_format(args.out, hdf5)
    if not hdf5:
        net = caffe_model.read_net(pb, args.model)
        if not net.layer:
            raise UserError("%s is in the format of before 2015: upgrade it "
                            "with Caffe's build/tools/"
                            "upgrade_net_proto_binary" % args.model)
    found = Chooser(pb, args, net and net.layer).choose(weights)
    converted = convert(found, weights, args)
    warn(found, args)
    content = (new_caffemodel(net, found, converted, args) if net
               else hdf5_writer(found, converted, args))
    caffe_model.write_all({args.out: content})
    eps = sorted({one.eps for one in found})
    print("converted %d layer%s from %s to %s with eps %s: %s" % (
        len(found), "s"[:len(found) != 1], args.source, args.target,
        ", ".join("%.4g" % value for value in eps),
        ", ".join(one.name for one in found)))
    print("made %s" % args.out)


def main():
    with user_errors():
        run(parse_args())


if __name__ == "__main__":
    main()
