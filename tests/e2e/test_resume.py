"""`caffe train --snapshot` goes on where the snapshot was taken."""

import itertools
import re

import pytest

from caffe_e2e import (
    IP1, LOSS, assert_same_weights, data_layer, lambda_at, logged_lambdas,
    margin_layer, read_model, run_caffe, write_net, write_solver)

SCHEDULE = dict(base=1000, gamma=0.12, power=2, lambda_min=1)
SCHEDULE_TEXT = " ".join("%s: %s" % pair for pair in SCHEDULE.items())
SUFFIX = {"BINARYPROTO": "", "HDF5": ".h5"}
# A run ends at END; another one goes on from its snapshot at HALF, which is
# between two epochs, so that both see the same data.
HALF, END = 6, 12


def net(folder, iteration=0, name="net.prototxt"):
    return write_net(folder, data_layer() + IP1 + margin_layer(
        "type: QUADRUPLE %s iteration: %d" % (SCHEDULE_TEXT, iteration))
        + LOSS, name)


def solve(folder, prefix, options=(), **solver):
    path = write_solver(folder, name=prefix + ".prototxt", snapshot=HALF,
                        snapshot_prefix=str(folder / prefix), max_iter=END,
                        **solver)
    return run_caffe("train", "--solver=%s" % path, *options, cwd=folder)


def side_by_side(title, whole, resumed):
    """Shown by `pytest -s`: the lambdas of both runs, by iteration."""
    resumed = dict(resumed)
    print("\n%s\n%10s %12s %12s" % (title, "iteration", "whole", "resumed"))
    for iteration, value in whole:
        print("%10d %12s %12s" % (iteration, value,
                                  resumed.get(iteration, "-")))


def check_goes_on(folder, title, whole, resumed):
    whole, again = logged_lambdas(whole), logged_lambdas(resumed)
    side_by_side(title, whole, again)
    assert [iteration for iteration, _ in whole] == list(range(END))
    assert again == whole[HALF:]


@pytest.mark.parametrize("form, iter_size, iteration", itertools.product(
    SUFFIX, (1, 3), (0, 40)))
def test_goes_on(data, form, iter_size, iteration):
    net(data, iteration)
    options = dict(snapshot_format=form, iter_size=iter_size)
    whole = solve(data, "whole", **options)
    resumed = solve(data, "resumed", **options, options=[
        "--snapshot=whole_iter_%d.solverstate%s" % (HALF, SUFFIX[form])])
    check_goes_on(data, "%s, iter_size %d, prototxt iteration %d" % (
        form, iter_size, iteration), whole, resumed)
    for step, value in logged_lambdas(resumed):
        passes = iteration + iter_size * (step + 1)
        assert float(value) == pytest.approx(lambda_at(passes, **SCHEDULE),
                                             rel=1e-5)

    model = "%%s_iter_%d.caffemodel%s" % (END, SUFFIX[form])
    assert_same_weights(data / (model % "whole"), data / (model % "resumed"))
    if form == "BINARYPROTO":
        for run in ("whole", "resumed"):
            layer = read_model(data / (model % run))["ip2"]
            assert (layer.largemargin_inner_product_param.iteration
                    == iteration + iter_size * END)

    said = re.search(
        r"LargeMarginInnerProduct layer 'ip2' resumes .*?(\d+), "
        r"lambda = (\S+)$", resumed, re.M)
    assert said, resumed
    assert "resumes" not in whole
    passes = iteration + iter_size * HALF
    assert int(said.group(1)) == passes
    assert float(said.group(2)) == pytest.approx(
        lambda_at(passes + 1, **SCHEDULE), rel=1e-5)


def test_goes_on_a_second_time(data):
    net(data, 40)
    whole = solve(data, "whole")
    options = ["--snapshot=whole_iter_%d.solverstate" % HALF]
    solve(data, "first", options=options)
    write_solver(data, name="longer.prototxt", max_iter=END + HALF,
                 snapshot_prefix=str(data / "longer"))
    longer = run_caffe("train", "--solver=longer.prototxt",
                       "--snapshot=first_iter_%d.solverstate" % END, cwd=data)
    assert logged_lambdas(whole)[-1] == (END - 1, "%.6g" % lambda_at(
        40 + END, **SCHEDULE))
    assert logged_lambdas(longer) == [
        (step, "%.6g" % lambda_at(40 + step + 1, **SCHEDULE))
        for step in range(END, END + HALF)]


def test_by_hand_as_with_the_original(data):
    """A prototxt iteration above that of the snapshot wins."""
    net(data)
    whole = solve(data, "whole")
    net(data, iteration=500)
    resumed = solve(data, "resumed", options=[
        "--snapshot=whole_iter_%d.solverstate" % HALF])
    again = logged_lambdas(resumed)
    side_by_side("prototxt iteration 500", logged_lambdas(whole), again)
    assert again == [(HALF + i, "%.6g" % lambda_at(501 + i, **SCHEDULE))
                     for i in range(END - HALF)]

    # The original's users set it to the iterations done: the same result.
    net(data, iteration=HALF)
    resumed = solve(data, "set", options=[
        "--snapshot=whole_iter_%d.solverstate" % HALF])
    check_goes_on(data, "prototxt iteration %d" % HALF, whole, resumed)
    assert_same_weights(data / ("whole_iter_%d.caffemodel" % END),
                        data / ("set_iter_%d.caffemodel" % END))


def test_a_snapshot_without_the_count(data):
    """A state whose model is the original's: solver iterations count."""
    from caffe.proto import caffe_pb2
    net(data, 40)
    whole = solve(data, "whole", iter_size=2)
    model = data / ("whole_iter_%d.caffemodel" % HALF)
    weights = caffe_pb2.NetParameter()
    weights.ParseFromString(model.read_bytes())
    for layer in weights.layer:
        layer.largemargin_inner_product_param.ClearField("iteration")
    model.write_bytes(weights.SerializeToString())
    resumed = solve(data, "resumed", iter_size=2, options=[
        "--snapshot=whole_iter_%d.solverstate" % HALF])
    check_goes_on(data, "a model without iteration", whole, resumed)


@pytest.mark.parametrize("form", SUFFIX)
def test_weights_start_lambda_afresh(data, form):
    net(data, 7)
    solve(data, "whole", snapshot_format=form)
    fresh = solve(data, "fresh", options=[
        "--weights=whole_iter_%d.caffemodel%s" % (END, SUFFIX[form])])
    assert logged_lambdas(fresh) == [
        (step, "%.6g" % lambda_at(7 + step + 1, **SCHEDULE))
        for step in range(END)]
    assert "resumes" not in fresh


def test_a_net_without_margin_layer_resumes_as_ever(data):
    text = data_layer() + IP1.replace("ip1", "ip2").replace(
        "num_output: 6", "num_output: 4") + LOSS
    write_net(data, text)
    whole = solve(data, "whole")
    resumed = solve(data, "resumed", options=[
        "--snapshot=whole_iter_%d.solverstate" % HALF])
    assert "resumes" not in whole + resumed
    assert_same_weights(data / ("whole_iter_%d.caffemodel" % END),
                        data / ("resumed_iter_%d.caffemodel" % END))


def test_two_margin_layers_resume_each_for_itself(data):
    second = margin_layer("margin: 2 base: 3 gamma: 1 iteration: 9",
                          tops=("other", "other_lambda")).replace(
                              'name: "ip2"', 'name: "other"')
    write_net(data, data_layer() + IP1 + margin_layer(
        "type: QUADRUPLE " + SCHEDULE_TEXT) + LOSS + second)

    def both(log):
        return re.findall(r"output #\d+: ((?:other_)?lambda = \S+)", log)

    whole = solve(data, "whole")
    resumed = solve(data, "resumed", options=[
        "--snapshot=whole_iter_%d.solverstate" % HALF])
    assert len(both(whole)) == 2 * END
    assert both(resumed) == both(whole)[2 * HALF:]
    assert len(re.findall(r"layer '(?:ip2|other)' resumes", resumed)) == 2
