"""From a net for training to one for deployment: what export_deploy.py does.

A net is a list of nodes in Caffe's order. Between them are values: a layer
that works in place takes one value and makes another of the same name, so
that the graph can be changed without a thought of names.
"""
import re

import numpy as np

from bn_dialect import check_statistics, moving_variance
from caffe_model import is_hdf5, text
from caffe_proto import UserError, in_phase

# The layer types of BVLC Caffe, whose Python layers need more than Caffe.
UPSTREAM = frozenset("""
    AbsVal Accuracy ArgMax BNLL BatchNorm BatchReindex Bias Clip Concat
    ContrastiveLoss Convolution Crop Data Deconvolution Dropout DummyData ELU
    Eltwise Embed EuclideanLoss Exp Filter Flatten HDF5Data HDF5Output
    HingeLoss Im2col ImageData InfogainLoss InnerProduct Input LRN LSTM
    LSTMUnit Log MVN MemoryData MultinomialLogisticLoss PReLU Parameter Pooling
    Power RNN ReLU Reduction Reshape SPP Scale Sigmoid SigmoidCrossEntropyLoss
    Silence Slice Softmax SoftmaxWithLoss Split Swish TanH Threshold Tile
    WindowData""".split())
MARGIN = "LargeMarginInnerProduct"
# For each loss: where its labels are, and the layer that shows its scores.
LOSSES = {
    "SoftmaxWithLoss": ((1,), "Softmax"),
    "InfogainLoss": ((1, 2), "Softmax"),
    "SigmoidCrossEntropyLoss": ((1,), "Sigmoid"),
    "MultinomialLogisticLoss": ((1,), None),
    "HingeLoss": ((1,), None),
    "EuclideanLoss": ((1,), None),
    "ContrastiveLoss": ((2,), None),
    "Accuracy": ((1,), None),
}
# Layers whose second top is a label.
LABELLED = ("Data", "ImageData", "MemoryData", "WindowData")


class Value:
    """What a layer makes as its top number `index`.

    name is that of the blob in Caffe's net.
    """

    def __init__(self, name, index=0):
        self.name, self.index = name, index


class Node:
    """A layer, its values and its weights."""

    def __init__(self, layer, bottoms, tops):
        self.layer, self.bottoms, self.tops = layer, bottoms, tops
        self.blobs = []
        self.folded = []

    @property
    def name(self):
        return self.layer.name

    @property
    def type(self):
        return self.layer.type

    @property
    def is_source(self):
        """Whether it brings data into the net."""
        return not self.bottoms and self.type != "Parameter"

    def __str__(self):
        return "layer '%s' (%s)" % (self.name, self.type)


def is_source(layer):
    """Whether a layer brings data into the net."""
    return not layer.bottom and layer.type != "Parameter"


def is_loss(node):
    return node.type in LOSSES or node.type.endswith("Loss") or \
        node.type != MARGIN and any(node.layer.loss_weight)


def label_positions(node):
    """Which bottoms of a node are labels."""
    if node.type == MARGIN:
        return (1,)
    if node.type in LOSSES:
        return LOSSES[node.type][0]
    if is_loss(node):  # one of another Caffe's, or of the user's
        return (len(node.bottoms) - 1,) if len(node.bottoms) > 1 else ()
    return ()


class Graph:
    """The layers of the net of a phase, "TEST" or "TRAIN".

    outputs: the values that the deployed net is for.
    notes: what the user should know of what was left out.
    """

    def __init__(self, pb, net, path, phase="TEST"):
        self.pb, self.path, self.phase = pb, path, phase
        other = {"TEST": "TRAIN", "TRAIN": "TEST"}[phase]
        self.notes = []
        if not net.layer:
            raise UserError("%s has no layers" % path)
        here, there = ([in_phase(pb, net, layer, pb.Phase.Value(one))
                        for layer in net.layer] for one in (phase, other))
        layers = legacy_inputs(pb, net) + [
            layer for layer, is_here in zip(net.layer, here) if is_here]
        self.others = [layer for layer, is_here, is_there in zip(
            net.layer, here, there) if is_there and not is_here]
        if not any(is_source(layer) for layer in layers):
            layers = [layer for layer in self.others
                      if is_source(layer)] + layers
        self.nodes, seen = [], set()
        current = {}
        for layer in layers:
            if layer.name in seen:
                raise UserError("%s has two layers '%s' in the %s phase"
                                % (path, layer.name, phase))
            seen.add(layer.name)
            bottoms = []
            for name in layer.bottom:
                if name not in current:
                    raise UserError("layer '%s' of %s takes '%s', which no "
                                    "layer before it makes in the %s phase"
                                    % (layer.name, path, name, phase))
                bottoms.append(current[name])
            tops = [Value(name, i) for i, name in enumerate(layer.top)]
            current.update(zip(layer.top, tops))
            copied = pb.LayerParameter()
            copied.CopyFrom(layer)
            copied.ClearField("blobs")
            self.nodes.append(Node(copied, bottoms, tops))
        for layer in self.others:
            if layer.type in (MARGIN, "InnerProduct") and \
                    layer.name not in seen:
                self.notes.append("layer '%s' (%s) is left out: only the %s "
                                  "phase has it"
                                  % (layer.name, layer.type, other))
        self.last, self.aliases = current, {}
        self.outputs = []

    def consumers(self, value):
        """The nodes that take a value, once for each time they do."""
        return [node for node in self.nodes for bottom in node.bottoms
                if bottom is value]

    # ---- From training to a plain net ----

    def strip(self):
        """Takes away what is for training: labels, losses, accuracies.

        What is left has the plugin's layers still, and makes the outputs.
        """
        self.order_euclidean()
        labels = self.labels()
        softmaxed = self.heads_of_others()
        gone, kept, wanted = set(labels), [], []
        for node in self.nodes:
            where = label_positions(node)
            if node.is_source:
                node.tops = [top for top in node.tops if top not in gone]
                if node.tops:
                    kept.append(node)
                continue
            used = [bottom for i, bottom in enumerate(node.bottoms)
                    if i not in where or node.type != MARGIN]
            if is_loss(node):
                for i, bottom in enumerate(node.bottoms):
                    if i not in where and bottom not in gone:
                        wanted.append(bottom)
                        if LOSSES.get(node.type, (None, None))[1]:
                            softmaxed.append((node, bottom))
                gone.update(node.tops)
            elif node.type == "Silence":
                gone.update(node.tops)
            elif node.type == "HDF5Output":
                wanted += [bottom for bottom in used if bottom not in gone]
            elif used and all(bottom in gone for bottom in used):
                gone.update(node.tops)
            elif any(bottom in gone for bottom in used):
                bad = next(bottom for bottom in used if bottom in gone)
                raise UserError("%s takes '%s', which comes from labels or "
                                "losses: such a layer cannot be deployed"
                                % (node, bad.name))
            else:
                if node.type == MARGIN:
                    gone.update(self.plain_margin(node))
                kept.append(node)
        silenced = {bottom for node in self.nodes if node.type == "Silence"
                    for bottom in node.bottoms}
        taken = {bottom for node in self.nodes for bottom in node.bottoms}
        self.nodes = kept
        for node in kept:
            if not node.is_source:
                wanted += [top for top in node.tops
                           if top not in taken and top not in silenced]
        self.outputs = list(dict.fromkeys(wanted))
        if not self.outputs:
            raise UserError("%s makes nothing from its data in the %s phase"
                            % (self.path, self.phase))
        heads = {}
        for loss, value in softmaxed:
            value = self.aliases.get(value, value)
            if any(value in node.tops for node in kept):
                heads.setdefault(value, loss)
        for value, loss in heads.items():
            self.add_scores(loss, value, len(heads) == 1)
        self.prune()
        self.split_sources()
        for node in self.nodes:
            if node.type not in UPSTREAM and node.type not in (MARGIN, "BN"):
                raise UserError("%s is no layer of upstream Caffe, and there "
                                "is no way to replace it" % node)

    def order_euclidean(self):
        """Puts the label of an EuclideanLoss second: its order is free."""
        for node in self.nodes:
            if node.type == "EuclideanLoss" and len(node.bottoms) == 2 and \
                    any(node.bottoms[0] in source.tops[1:]
                        for source in self.nodes
                        if source.type in LABELLED):
                node.bottoms.reverse()

    def labels(self):
        """The tops of data layers that only labels of layers come from."""
        found = set()
        for node in self.nodes:
            if not node.is_source:
                continue
            for i, top in enumerate(node.tops):
                ends = self.ends(top)
                if "score" in ends:
                    continue
                if "label" in ends and "open" not in ends or \
                        i > 0 and node.type in LABELLED:
                    found.add(top)
        return found

    def ends(self, value):
        """Where a value ends: at a layer's "score", "label" or "open"."""
        found, seen, todo = set(), set(), [value]
        while todo:
            value = todo.pop()
            if value in seen:
                continue
            seen.add(value)
            users = self.consumers(value)
            if not users:
                found.add("open")
            for node in users:
                for i, bottom in enumerate(node.bottoms):
                    if bottom is not value or node.type == "Silence":
                        continue
                    if i in label_positions(node):
                        found.add("label")
                    elif is_loss(node) or node.type == MARGIN:
                        found.add("score")
                    else:
                        todo += node.tops
        return found

    def heads_of_others(self):
        """The losses of the other phase alone whose scores are here too."""
        found = []
        for layer in self.others:
            if LOSSES.get(layer.type, (None, None))[1] and layer.bottom and \
                    layer.bottom[0] in self.last:
                found.append((Node(layer, [], []),
                              self.last[layer.bottom[0]]))
        return found

    def plain_margin(self, node):
        """Leaves a margin layer one bottom and one top; returns the rest."""
        node.bottoms = node.bottoms[:1]
        logits, rest = node.tops[0], node.tops[1:]
        node.tops = [logits]
        if len(rest) > 1:  # the logits without margin
            self.aliases[rest[1]] = logits
            for user in self.nodes:
                user.bottoms = [logits if bottom is rest[1] else bottom
                                for bottom in user.bottoms]
        return rest

    def add_scores(self, loss, value, alone):
        """Adds the Softmax or Sigmoid of a loss where there is none."""
        kind = LOSSES[loss.type][1]
        if any(node.type == kind for node in self.consumers(value)):
            return
        if alone:
            top = "prob"
        else:
            top = re.sub("loss", "prob", loss.name, flags=re.I)
            if top == loss.name:
                top += "_prob"
        layer = self.pb.LayerParameter(name=self.free_name(top), type=kind)
        if kind == "Softmax":
            axis = (loss.layer.infogain_loss_param.axis
                    if loss.type == "InfogainLoss"
                    else loss.layer.softmax_param.axis)
            if axis != 1:
                layer.softmax_param.axis = axis
        result = Value(self.free_blob(top))
        self.nodes.append(Node(layer, [value], [result]))
        self.outputs = [output for output in self.outputs
                        if output is not value] + [result]

    def free_name(self, name):
        """A layer's name that no layer has yet."""
        return free(name, {node.name for node in self.nodes})

    def free_blob(self, name):
        """A blob's name that no blob has yet."""
        return free(name, {value.name for node in self.nodes
                           for value in node.tops})

    def prune(self):
        """Drops what none of the outputs needs."""
        needed, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if any(top in needed for top in node.tops):
                needed.update(node.bottoms)
                kept.append(node)
            elif not node.is_source:
                self.notes.append("%s is left out: nothing needs it" % node)
        self.nodes = kept[::-1]
        for node in self.nodes:
            if node.is_source:
                node.tops = [top for top in node.tops if top in needed]

    def split_sources(self):
        """Gives every input a layer of its own, as Input layers are used."""
        nodes = []
        for node in self.nodes:
            if not node.is_source or len(node.tops) == 1:
                nodes.append(node)
                continue
            for top in node.tops:
                layer = self.pb.LayerParameter()
                layer.CopyFrom(node.layer)
                layer.name = self.free_name(top.name)
                nodes.append(Node(layer, [], [top]))
        self.nodes = nodes

    def inputs(self):
        """The nodes that bring data, with a value each."""
        return [node for node in self.nodes if node.is_source]

    def set_inputs(self, shapes):
        """Makes the data layers Input layers, with shapes by blob."""
        for node in self.inputs():
            node.layer = self.pb.LayerParameter(name=node.name, type="Input")
            node.layer.input_param.shape.add().dim.extend(
                shapes[node.tops[0].name])

    # ---- Weights ----

    def load(self, weights, shapes):
        """Gives the nodes their blobs as Caffe would.

        shapes: those of the parameters, by layer.
        """
        slots, owners = {}, {}
        nodes = {node.name: node for node in self.nodes}
        for node in self.nodes:
            for i in range(len(shapes.get(node.name, ()))):
                spec = node.layer.param[i] if i < len(node.layer.param) \
                    else None
                slot = (node.name, i)
                if spec is not None and spec.name:
                    slot = owners.setdefault(spec.name, slot)
                slots[node.name, i] = slot
        values = {}
        for name, blobs in weights.items():
            if name not in shapes or name not in nodes:
                continue
            node, wanted = nodes[name], shapes[name]
            self.check_count(node, blobs, len(wanted), weights.path)
            for i, blob in enumerate(blobs):
                if blob is not None:
                    values[slots[name, i]] = fit(
                        node, i, blob, wanted[i], weights.path)
        for node in self.nodes:
            wanted = shapes.get(node.name, ())
            node.blobs = []
            for i, shape in enumerate(wanted):
                blob = values.get(slots[node.name, i])
                if blob is None:
                    raise UserError("%s has no weights in %s"
                                    % (node, weights.path))
                if not np.isfinite(blob).all():
                    raise UserError("%s: blob %d in %s holds numbers that are "
                                    "not finite" % (node, i, weights.path))
                node.blobs.append(blob.reshape(shape))

    @staticmethod
    def check_count(node, blobs, wanted, path):
        # HDF5 leaves out the blobs that another layer owns.
        if len(blobs) > wanted or len(blobs) < wanted and not is_hdf5(path):
            hint = ""
            if node.type == MARGIN and len(blobs) == 2:
                hint = ": it was an InnerProduct with a bias, which the " \
                    "margin layer lacks"
            raise UserError("%s has %d blobs in %s where the net has %d%s"
                            % (node, len(blobs), path, wanted, hint))

    # ---- To upstream's layers ----

    def replace_plugin(self, fold, shapes):
        """Replaces the plugin's layers by upstream's.

        fold: whether BN goes into the layer before it where it can.
        shapes: those of the blobs, by name.
        """
        nodes, makers = [], {}
        for node in self.nodes:
            made = [node]
            if node.type == MARGIN:
                self.replace_margin(node)
            elif node.type == "BN":
                before = makers.get(node.bottoms[0])
                if fold and before and self.folds(before, node, shapes):
                    fold_bn(before, node)
                    made = []
                    makers[node.tops[0]] = before
                else:
                    made = self.replace_bn(node)
            for new in made:
                for top in new.tops:
                    makers[top] = new
            nodes += made
        self.nodes = nodes

    def replace_margin(self, node):
        old = node.layer.largemargin_inner_product_param
        layer = self.pb.LayerParameter(name=node.name, type="InnerProduct")
        param = layer.inner_product_param
        param.num_output = old.num_output
        param.bias_term = False
        if old.axis != 1:
            param.axis = old.axis
        node.layer = layer

    def folds(self, before, bn, shapes):
        """Whether a BN can go into the layer that makes its bottom."""
        value = bn.bottoms[0]
        if len(self.consumers(value)) > 1 or value in self.outputs:
            return False
        shape = shapes[value.name]
        if before.type in ("Convolution", "Deconvolution"):
            axis = before.layer.convolution_param.axis
        elif before.type == "InnerProduct":
            # Its outputs are the last axis; BN's channels are the second.
            if len(shape) != 2:
                return False
            axis = before.layer.inner_product_param.axis
        else:
            return False
        return axis % len(shape) == 1

    def replace_bn(self, node):
        """The BatchNorm and the Scale of a BN."""
        slope, bias, mean, inv_std = statistics(node)
        eps = node.layer.bn_param.eps
        variance, slope = moving_variance(inv_std, slope, eps)
        norm = self.pb.LayerParameter(name=node.name, type="BatchNorm")
        norm.batch_norm_param.use_global_stats = True
        norm.batch_norm_param.eps = eps
        scale = self.pb.LayerParameter(
            name=self.free_name(node.name + "_scale"), type="Scale")
        scale.scale_param.bias_term = True
        middle = Value(node.tops[0].name)
        first = Node(norm, node.bottoms, [middle])
        first.blobs = [mean, variance, np.ones(1)]
        second = Node(scale, [middle], node.tops)
        second.blobs = [slope, bias]
        return [first, second]

    def spell_out(self):
        """Writes in one way what other programs read in another than Caffe.

        OpenCV passes over `transpose`, and has another alpha for LRN where
        none is written.
        """
        for node in self.nodes:
            if node.type == "InnerProduct":
                param = node.layer.inner_product_param
                if param.transpose:
                    node.blobs[0] = node.blobs[0].T
                param.ClearField("transpose")
            elif node.type == "LRN":
                param = node.layer.lrn_param
                param.alpha = param.alpha

    # ---- Back to prototxt ----

    def net(self, name, for_deploy):
        """The NetParameter of the nodes, without weights.

        for_deploy: leave out what counts for training only.
        """
        pb = self.pb
        net = pb.NetParameter(name=name)
        self.settle_names()
        for node in self.nodes:
            layer = net.layer.add()
            layer.CopyFrom(node.layer)
            for field in ("phase", "include", "exclude", "loss_weight",
                          "propagate_down", "bottom", "top"):
                layer.ClearField(field)
            layer.bottom.extend(value.name for value in node.bottoms)
            layer.top.extend(value.name for value in node.tops)
            if not is_source(layer):
                layer.ClearField("transform_param")
            if for_deploy:
                layer.ClearField("param")
            clear_for_training(layer, for_deploy)
        return net

    def settle_names(self):
        """Renames what works in place where its bottom is needed later."""
        used = {value.name for node in self.nodes for value in node.tops}
        for node in self.nodes:
            for top in node.tops:
                for bottom in node.bottoms:
                    if bottom is not top and bottom.name == top.name and (
                            len(self.consumers(bottom)) > 1
                            or bottom in self.outputs):
                        top.name = free("%s_%s" % (top.name, node.name), used)
                        used.add(top.name)


def legacy_inputs(pb, net):
    """Input layers for the inputs of an old deploy net."""
    found = []
    for i, name in enumerate(net.input):
        layer = pb.LayerParameter(name=name, type="Input", top=[name])
        shape = layer.input_param.shape.add()
        if net.input_shape:
            shape.CopyFrom(net.input_shape[min(i, len(net.input_shape) - 1)])
        else:
            shape.dim.extend(net.input_dim[4 * i:4 * i + 4])
        found.append(layer)
    return found


def free(name, taken):
    """The name, with a number behind it where it is taken."""
    found, number = name, 2
    while found in taken:
        found = "%s%d" % (name, number)
        number += 1
    return found


def clear_for_training(message, fillers):
    """Clears, in a layer's parameters, engines and, if asked, fillers.

    An engine that another Caffe lacks is an error there.
    """
    for field, value in message.ListFields():
        if field.name == "engine" or (
                fillers and field.message_type is not None
                and field.message_type.name == "FillerParameter"):
            message.ClearField(field.name)
        elif field.message_type is not None and \
                field.label != field.LABEL_REPEATED and \
                field.name.endswith("_param"):
            clear_for_training(value, fillers)


def fit(node, i, blob, shape, path):
    """A blob in the shape that the net gives it, where Caffe takes it."""
    given = blob.shape
    # The old four dimensions begin with ones.
    if len(given) == 4 and len(shape) < 4 and \
            given == (1,) * (4 - len(shape)) + shape:
        return blob.reshape(shape)
    if given == shape:
        return blob
    if node.type == "BN" and given == shape + (1, 1):
        raise UserError("%s: blob %d in %s has the shape %s: so have those "
                        "of the other dialect of BN, whose fourth blob is the "
                        "moving variance; if it is one, add --bn variance"
                        % (node, i, path, text(given)))
    raise UserError("%s: blob %d in %s has the shape %s where the net has %s"
                    % (node, i, path, text(given), text(shape)))


def statistics(bn):
    """Slope, bias, mean and inverse standard deviation, in double."""
    found = [np.asarray(blob, np.float64).ravel() for blob in bn.blobs]
    check_statistics(str(bn), found[3])
    return found


def fold_bn(before, bn):
    """Puts a BN into the weights and the bias of the layer before it."""
    slope, bias, mean, inv_std = statistics(bn)
    factor = slope * inv_std
    weights = np.asarray(before.blobs[0], np.float64)
    old = np.asarray(before.blobs[1], np.float64).ravel() \
        if len(before.blobs) > 1 else np.zeros_like(bias)
    if before.type == "InnerProduct":
        param = before.layer.inner_product_param
        weights = weights * (factor if param.transpose else factor[:, None])
    else:
        param = before.layer.convolution_param
        rest = (1,) * (weights.ndim - 2)
        if before.type == "Convolution":
            weights = weights * factor.reshape((-1, 1) + rest)
        else:
            # (inputs, outputs of a group, ...); a group's inputs stand
            # together.
            groups = param.group
            each = factor.reshape(groups, 1, -1)
            each = np.broadcast_to(
                each, (groups, weights.shape[0] // groups, each.shape[2]))
            weights = weights * each.reshape(
                weights.shape[0], -1, *rest)
    before.blobs = [weights, (old - mean) * factor + bias]
    param.bias_term = True
    before.tops = bn.tops
    before.folded.append(bn.name)
