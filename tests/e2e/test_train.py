"""`caffe train`, `caffe test` and `caffe time`; models that interchange."""

import os
import re
import subprocess

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

import caffe
from caffe.proto import caffe_pb2
from caffe_e2e import (
    CAFFE, IP1, LOSS, ROOT, data_layer, deploy_input, environment,
    inner_product, lambda_at, logged_lambdas, margin_layer, read_model,
    read_weights, run_caffe, write_net, write_solver)

SCHEDULE = dict(base=1000, gamma=0.12, power=2, lambda_min=5)
SCHEDULE_TEXT = " ".join("%s: %s" % pair for pair in SCHEDULE.items())
ACCURACY = """
layer {
  name: "accuracy" type: "Accuracy" bottom: "%s" bottom: "label"
  top: "accuracy"
}
"""


def train(folder, text, name="solver.prototxt", options=(), **solver):
    write_net(folder, text)
    path = write_solver(folder, name=name, **solver)
    return run_caffe("train", "--solver=%s" % path, *options, cwd=folder)


def final_loss(log):
    return float(re.findall(r"\] Iteration \d+, loss = (\S+)", log)[-1])


def margin_net(param, **layer):
    return data_layer() + IP1 + margin_layer(param, **layer) + LOSS


def test_lambda_in_the_log_is_the_formula(data):
    log = train(data, margin_net("type: QUADRUPLE " + SCHEDULE_TEXT),
                max_iter=200)
    found = logged_lambdas(log)
    # Caffe shows the outputs of a last forward pass only for its loss.
    assert [iteration for iteration, _ in found] == list(range(200))
    for iteration, value in found:
        expected = lambda_at(iteration + 1, **SCHEDULE)
        assert float(value) == pytest.approx(expected, rel=1e-5)
    assert found[-1][1] == "5" and found[0][1] != "5"


def test_iter_size_counts_forward_passes(data):
    log = train(data, margin_net("type: QUADRUPLE " + SCHEDULE_TEXT),
                iter_size=3)
    for iteration, value in logged_lambdas(log):
        expected = lambda_at(3 * (iteration + 1), **SCHEDULE)
        assert float(value) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("margin", [
    "type: SINGLE", "type: DOUBLE", "type: TRIPLE", "type: QUADRUPLE",
    "margin: 5", "margin: 8"])
def test_training_learns(data, margin):
    net = margin_net(margin + " base: 100 gamma: 0.2 power: 2",
                     tops=("ip2", "lambda", "plain"))
    log = train(data, net + ACCURACY % "plain", max_iter=300)
    assert final_loss(log) < 0.1
    accuracies = re.findall(r"output #\d+: accuracy = (\S+)", log)
    assert float(accuracies[-1]) == 1


def test_the_margin_is_a_harder_objective(data):
    """m = 1 trains as InnerProduct does, to the last digit; m = 4 does not."""
    logs = [train(data, data_layer() + IP1 + layer + LOSS) for layer in (
        inner_product(), margin_layer("type: SINGLE"),
        margin_layer("type: QUADRUPLE base: 0"))]
    losses = [re.findall(r"Train net output #\d+: loss = (\S+)", log)
              for log in logs]
    assert len(losses[0]) == 12
    assert losses[0] == losses[1]
    assert float(losses[2][0]) > float(losses[0][0])


def test_caffe_test_and_time(data):
    net = margin_net("type: QUADRUPLE base: 10 gamma: 0.1") + ACCURACY % "ip2"
    train(data, net, max_iter=200)
    log = run_caffe("test", "--model=net.prototxt", "--iterations=2",
                    "--weights=snap_iter_200.caffemodel", cwd=data)
    assert re.search(r"\] accuracy = 1$", log, re.M), log
    log = run_caffe("time", "--model=net.prototxt", "--iterations=3", cwd=data)
    assert re.search(r"ip2\s+forward: \S+ ms\.", log)
    assert re.search(r"ip2\s+backward: \S+ ms\.", log)


def test_original_pattern_of_train_and_test_layers(data):
    """Two layers of one name and one param name, as in its examples."""
    net = (data_layer() + IP1
           + margin_layer("type: QUADRUPLE base: 100 gamma: 0.1 iteration: 0",
                          extra='param { name: "ip2" lr_mult: 1 } '
                          'include { phase: TRAIN }')
           + margin_layer("type: SINGLE base: 0 gamma: 1 iteration: 0",
                          tops=("ip2",),
                          extra='param { name: "ip2" lr_mult: 1 } '
                          'include { phase: TEST }')
           + LOSS + ACCURACY.replace('top: "accuracy"',
                                     'top: "accuracy" include {phase: TEST}')
           % "ip2")
    log = train(data, net, max_iter=200, test_iter=2, test_interval=100)
    accuracies = re.findall(r"Test net output #\d+: accuracy = (\S+)", log)
    assert len(accuracies) == 3
    assert float(accuracies[-1]) == 1


def test_train_and_test_layers_as_the_readme_has_them(data):
    blocks = re.findall(r"(?ms)^```\w*\n(.*?)^```$",
                        (ROOT / "README.md").read_text())
    pair, = [block for block in blocks if "phase: TRAIN" in block
             and "phase: TEST" in block]
    assert pair.count('type: "LargeMarginInnerProduct"') == 2
    net = (data_layer() + IP1 + pair.replace('"features"', '"ip1"') + LOSS
           + ACCURACY.replace('top: "accuracy"',
                              'top: "accuracy" include { phase: TEST }')
           % "ip2")
    log = train(data, net, max_iter=200, test_iter=2, test_interval=200)
    assert not re.search(r"^W.*layer 'ip2'", log, re.M)
    accuracies = re.findall(r"Test net output #\d+: accuracy = (\S+)", log)
    assert float(accuracies[-1]) > 0.9 > float(accuracies[0])


def test_a_test_layer_of_another_name_is_never_trained(data):
    """Caffe shares between nets by the layer's name, not the param's."""
    shared = 'param { name: "ip2" } include { phase: %s }'
    test = margin_layer("type: SINGLE", tops=("ip2",), extra=shared % "TEST")
    net = (data_layer() + IP1
           + margin_layer("type: QUADRUPLE base: 100 gamma: 0.1",
                          extra=shared % "TRAIN")
           + "%s" + LOSS + ACCURACY.replace(
               'top: "accuracy"', 'top: "accuracy" include {phase: TEST}')
           % "ip2")
    options = dict(max_iter=200, test_iter=2, test_interval=100)
    warning = "layer 'test_ip2' of test net #0 never gets the weights"
    log = train(data, net % test.replace('name: "ip2" type', (
        'name: "test_ip2" type')), **options)
    assert len(re.findall(r"^W.*%s" % warning, log, re.M)) == 1
    assert "Call it 'ip2'" in log and "Ignoring source layer ip2" in log
    accuracies = re.findall(r"Test net output #\d+: accuracy = (\S+)", log)
    assert float(accuracies[-1]) < 0.9
    assert "never gets" not in train(data, net % test, **options)


def test_a_test_layer_of_another_name_warns(data):
    """Also where the layers have no param name that would show what is meant:
    the shape of the weights does."""
    train_layer = margin_layer("type: QUADRUPLE",
                               extra="include { phase: TRAIN }")
    for test_layer in (
            margin_layer(bottoms=("ip1",), tops=("ip2",),
                         extra="include { phase: TEST }"),
            inner_product("include { phase: TEST }")):
        for name, warned in (("ip2", 0), ("other", 1)):
            named = test_layer.replace('name: "ip2"', 'name: "%s"' % name)
            log = train(data, data_layer() + IP1 + train_layer + named + LOSS,
                        max_iter=2, test_iter=1, test_interval=1)
            said = warnings(log, "other")
            assert len(said) == warned
            assert all("Call it 'ip2'" in words for words in said)


def test_a_margin_without_labels_warns(data):
    for param, warned in (("type: QUADRUPLE", 1), ("type: SINGLE", 0)):
        said = warnings(train(data, data_layer() + IP1 + margin_layer(
            param, bottoms=("ip1",)) + LOSS, max_iter=2), "ip2")
        assert len(said) == warned
        assert all("TRAIN phase has no labels" in words
                   and "without the margin of 4" in words for words in said)


def test_the_passes_of_a_model_in_a_prototxt_warn(data):
    """As one has them that was made of a snapshot's text: without a word, the
    descent of a new training would begin where that of the old one ended."""
    for param, warned in (("passes: 50", 1), ("passes: 50 iteration: 49", 1),
                          ("passes: 50 iteration: 50", 0),
                          ("iteration: 50", 0)):
        log = train(data, data_layer() + IP1 + margin_layer(
            "margin: 4 base: 1000 gamma: 1 " + param) + LOSS, max_iter=1)
        assert logged_lambdas(log) == [(0, "%.6g" % np.float32(1000 / 52))]
        said = warnings(log, "ip2")
        assert len(said) == warned
        assert all("after 50 forward passes, lambda = 19.2308" in words
                   and "Delete it to begin" in words for words in said)


def warnings(log, name):
    return re.findall(r"^W\S+ .*\] (\S+ layer '%s'.*)$" % name, log, re.M)


@pytest.mark.parametrize("layer, warned", [
    (dict(param="type: QUADRUPLE"), True),
    (dict(param="margin: 2"), True),
    (dict(param="margin: 1 type: QUADRUPLE"), False),
    (dict(param="type: SINGLE"), False),
    (dict(param="type: QUADRUPLE", tops=("ip2", "lambda", "plain")), False),
    (dict(param="type: QUADRUPLE", extra="include { phase: TRAIN }"), False)])
def test_a_margin_in_the_test_phase_warns(data, layer, warned):
    """Accuracy would judge the margin: once a layer, with the remedy."""
    text = margin_layer(**layer)
    if "include" in text:
        text += margin_layer("type: SINGLE", extra="include { phase: TEST }")
    log = train(data, data_layer() + IP1 + text + LOSS, max_iter=4,
                test_iter=1, test_interval=2)
    said = warnings(log, "ip2")
    assert len(said) == warned
    for words in ("TEST phase", "third top", "type: SINGLE") * warned:
        assert words in said[0]


def test_the_margin_in_the_test_phase_is_what_accuracy_sees(data):
    """What the warning is about, on samples that are hard to tell apart."""
    log = train(data, margin_net("type: QUADRUPLE base: 0", tops=(
        "ip2", "lambda", "plain")) + ACCURACY % "ip2" + ACCURACY.replace(
            '"accuracy"', '"plain_accuracy"') % "plain",
        max_iter=20, test_iter=2, test_interval=20)
    with_margin, without = (float(re.findall(
        r"Test net output #\d+: %s = (\S+)" % name, log)[-1])
        for name in ("accuracy", "plain_accuracy"))
    assert with_margin < without


def test_layers_of_one_net_share_a_param(data):
    """Both layers use the one blob, and both add to its gradient."""
    shared = 'param { name: "w" }'
    loss = LOSS.replace('"loss"', '"plain_loss"').replace('"ip2"', '"plain"')
    path = write_net(data, margin_net("margin: 3", extra=shared)
                     + inner_product(shared, name="plain") + loss)
    net = caffe.SGDSolver(str(write_solver(data, net=path))).net
    assert "plain" in net.params and "ip2" in net.params
    net.params["ip2"][0].data[...] = np.random.RandomState(3).randn(4, 6)
    assert np.array_equal(net.params["plain"][0].data,
                          net.params["ip2"][0].data)
    net.clear_param_diffs()
    net.forward()
    net.backward()
    both = net.params["ip2"][0].diff.copy()
    alone = []
    for start, end in (("loss", "ip2"), ("plain_loss", "plain")):
        net.clear_param_diffs()
        for name in net._layer_names:
            if name in net.blobs and name not in ("data", "label"):
                net.blobs[name].diff[...] = 0
        net.blobs[start].diff[...] = 1
        net._backward(list(net._layer_names).index(start),
                      list(net._layer_names).index(start))
        layer = list(net._layer_names).index(end)
        net._backward(layer, layer)
        alone.append(net.params["ip2"][0].diff.copy())
    assert np.abs(alone[0]).max() > 0 and np.abs(alone[1]).max() > 0
    np.testing.assert_allclose(both, alone[0] + alone[1], rtol=1e-5,
                               atol=1e-6)


def peak_memory(folder, layer, label):
    """The resident set, in MiB, of `caffe time` over 1024 x 8192 logits."""
    write_net(folder, """
force_backward: true
layer {
  name: "x" type: "DummyData" top: "ip1" top: "label"
  dummy_data_param {
    shape { dim: 1024 dim: 8 } shape { dim: 1024 }
    data_filler { type: "gaussian" } data_filler { value: 3 }
  }
}
""" + layer.replace("num_output: 4", "num_output: 8192") + label)
    caffe_time = subprocess.Popen(
        [str(CAFFE), "time", "--model=net.prototxt", "--iterations=2"],
        cwd=folder, env=environment(), stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(caffe_time.pid, 0)
    assert status == 0
    return usage.ru_maxrss / 1024


def test_no_more_memory_than_inner_product(data):
    """A buffer of the logits' size would be 32 MiB."""
    silence = 'layer { name: "silence" type: "Silence" bottom: "label" }'
    plain = peak_memory(data, inner_product(), silence)
    margin = peak_memory(data, margin_layer("margin: 4", tops=("ip2",)), "")
    assert plain > 2 * 32
    assert margin < plain + 8


def outputs(folder, text, weights, samples):
    net = caffe.Net(str(write_net(folder, deploy_input() + IP1 + text,
                                  "deploy.prototxt")),
                    str(weights), caffe.TEST)
    net.blobs["data"].data[...] = samples
    return net.forward()["ip2"].copy()


DEPLOYED = margin_layer("type: QUADRUPLE base: 0", tops=("ip2",),
                        bottoms=("ip1",))


@pytest.mark.parametrize("trained", ["margin layer", "InnerProduct"])
@pytest.mark.parametrize("form", ["BINARYPROTO", "HDF5"])
def test_models_interchange_with_inner_product(data, trained, form):
    layer = (inner_product() if trained == "InnerProduct" else
             margin_layer("type: TRIPLE base: 10 gamma: 0.1"))
    train(data, data_layer() + IP1 + layer + LOSS, snapshot_format=form)
    model = data / ("snap_iter_12.caffemodel"
                    + (".h5" if form == "HDF5" else ""))
    weights = read_weights(model)
    assert weights["ip2", 0].shape == (4, 6)
    samples = np.random.RandomState(2).randn(32, 8)
    plain = outputs(data, inner_product(), model, samples)
    deployed = outputs(data, DEPLOYED, model, samples)
    assert plain.tobytes() == deployed.tobytes()
    hidden = samples @ weights["ip1", 0].T + weights["ip1", 1]
    hidden = np.where(hidden > 0, hidden, weights["prelu1", 0] * hidden)
    np.testing.assert_allclose(plain, hidden @ weights["ip2", 0].T, rtol=1e-4,
                               atol=1e-4)


def test_softmax_first_then_fine_tuning_with_margin(data):
    softmax = data_layer() + IP1 + inner_product() + LOSS
    log = train(data, softmax, max_iter=100)
    model = data / "snap_iter_100.caffemodel"
    fine = margin_net("type: QUADRUPLE base: 1000 gamma: 0.2 power: 3")
    tuned = train(data, fine, name="fine.prototxt", max_iter=300,
                  snapshot_prefix=str(data / "fine"),
                  options=["--weights=%s" % model])
    losses = [float(loss) for loss in re.findall(
        r"Train net output #\d+: loss = (\S+)", tuned)]
    # lambda starts near 1000: next to nothing changes at first.
    assert losses[0] < 2 * final_loss(log) + 0.05
    assert final_loss(tuned) < 0.1
    assert logged_lambdas(tuned)[0] == (0, "%.6g" % lambda_at(
        1, base=1000, gamma=0.2, power=3))


def original_model(folder, weights, slope):
    """A .caffemodel in the original release's wire format, made by protoc."""
    def blob(values):
        dims = " ".join("dim: %d" % d for d in values.shape)
        return "blobs { shape { %s } %s }" % (dims, " ".join(
            "data: %r" % float(v) for v in values.flat))

    text = """
name: "original"
layer {
  name: "bn1" type: "BN" bottom: "data" top: "bn1" phase: TRAIN
  bn_param {
    slope_filler { value: 1 } momentum: 0.8 eps: 0.001 frozen: true
    engine: CAFFE
  }
  %s %s %s %s
}
layer {
  name: "ip2" type: "LargeMarginInnerProduct" bottom: "bn1" bottom: "label"
  top: "ip2" top: "lambda" phase: TRAIN
  largemargin_inner_product_param {
    num_output: 4 type: QUADRUPLE weight_filler { value: 2 } axis: 1
    base: 1000 gamma: 0.000025 power: 35 iteration: 3 lambda_min: 5
  }
  %s
}
""" % (blob(slope), blob(slope + 1), blob(slope + 2), blob(slope + 3),
       blob(weights))
    proto = ROOT / "tests" / "e2e" / "original_model.proto"
    binary = subprocess.run(
        ["protoc", "--proto_path=%s" % proto.parent, "--encode=NetParameter",
         proto.name], input=text.encode(), stdout=subprocess.PIPE, check=True)
    path = folder / "original.caffemodel"
    path.write_bytes(binary.stdout)
    return path


def assert_original_parameters(layers):
    margin = layers["ip2"].largemargin_inner_product_param
    assert caffe_pb2.LargeMarginInnerProductParameter.QUADRUPLE == margin.type
    assert (margin.num_output, margin.axis, margin.base, margin.power,
            margin.iteration, margin.lambda_min) == (4, 1, 1000, 35, 3, 5)
    assert margin.gamma == pytest.approx(2.5e-5)
    assert margin.weight_filler.value == 2
    bn = layers["bn1"].bn_param
    assert (bn.slope_filler.value, bn.frozen, bn.engine) == (1, True, bn.CAFFE)
    assert bn.momentum == pytest.approx(0.8)
    assert bn.eps == pytest.approx(1e-3)


def test_a_model_of_the_original_loads(data):
    random = np.random.RandomState(7)
    weights = random.randn(4, 8).astype("f4")
    slope = random.rand(1, 8).astype("f4")
    model = original_model(data, weights, slope)
    fields = caffe_pb2.LayerParameter.DESCRIPTOR.fields_by_name
    # A fork that uses the original's numbers itself still gets the weights.
    if fields["largemargin_inner_product_param"].number == 202:
        assert_original_parameters(read_model(model))

    text = """
layer { name: "bn1" type: "BN" bottom: "data" top: "bn1" }
""" + margin_layer("type: QUADRUPLE", bottoms=("bn1", "label"))
    write_net(data, data_layer() + text + LOSS)
    net = caffe.Net(str(data / "net.prototxt"), str(model), caffe.TEST)
    assert np.array_equal(net.params["ip2"][0].data, weights)
    for i in range(4):
        assert np.array_equal(net.params["bn1"][i].data, slope + i)
    log = run_caffe("test", "--model=net.prototxt", "--iterations=1",
                    "--weights=%s" % model, cwd=data)
    assert "Ignoring source layer" not in log


def test_upstream_can_read_a_snapshot(data):
    """Only unknown fields are new to a Caffe without our messages."""
    train(data, data_layer() + """
layer { name: "bn" type: "BN" bottom: "data" top: "data" }
""" + IP1 + margin_layer("type: QUADRUPLE base: 10") + LOSS)
    upstream = descriptor_pb2.FileDescriptorProto()
    caffe_pb2.DESCRIPTOR.CopyToProto(upstream)
    ours = ("BNParameter", "LargeMarginInnerProductParameter")
    fields = ("bn_param", "largemargin_inner_product_param")
    for i in reversed(range(len(upstream.message_type))):
        message = upstream.message_type[i]
        if message.name in ours:
            del upstream.message_type[i]
        elif message.name == "LayerParameter":
            kept = [f for f in message.field if f.name not in fields]
            assert len(message.field) - len(kept) == 2
            del message.field[:]
            message.field.extend(kept)
    pool = descriptor_pool.DescriptorPool()
    pool.Add(upstream)
    descriptor = pool.FindMessageTypeByName("caffe.NetParameter")
    if hasattr(message_factory, "GetMessageClass"):
        net = message_factory.GetMessageClass(descriptor)()
    else:
        net = message_factory.MessageFactory(pool).GetPrototype(descriptor)()
    model = data / "snap_iter_12.caffemodel"
    net.ParseFromString(model.read_bytes())
    assert net.IsInitialized()
    seen = {(layer.name, i): np.array(blob.data, "f4").reshape(blob.shape.dim)
            for layer in net.layer for i, blob in enumerate(layer.blobs)}
    expected = read_weights(model)
    assert seen.keys() == expected.keys()
    assert all(np.array_equal(seen[key], expected[key]) for key in seen)


def test_the_tool_lists_no_duplicate_layer():
    """A layer type registered twice would end every tool at its start."""
    done = subprocess.run([str(CAFFE), "train"], stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, text=True)
    assert "already registered" not in done.stdout
    types = list(caffe.layer_type_list())
    assert types.count("LargeMarginInnerProduct") == 1
    assert types.count("BN") == 1
