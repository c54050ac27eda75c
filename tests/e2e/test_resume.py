"""`caffe train --snapshot` goes on where the snapshot was taken."""

import itertools
import re
import shutil

import h5py
import numpy as np
import pytest

from caffe_e2e import (
    IP1, LOSS, assert_same_weights, data_layer, lambda_at, logged_lambdas,
    margin_layer, read_model, run_caffe, write_data, write_net, write_solver)

SCHEDULE = dict(base=1000, gamma=0.12, power=2, lambda_min=1)
SCHEDULE_TEXT = " ".join("%s: %s" % pair for pair in SCHEDULE.items())
SUFFIX = {"BINARYPROTO": "", "HDF5": ".h5"}
# A run ends at END; another one goes on from its snapshot at HALF, which is
# between two epochs, so that both see the same data.
HALF, END = 6, 12
# form, iter_size, iteration of the prototxt
KINDS = list(itertools.product(SUFFIX, (1, 2), (0, 7)))


def net(folder, iteration=0, name="ip2"):
    return write_net(folder, (data_layer() + IP1 + margin_layer(
        "type: QUADRUPLE %s iteration: %d" % (SCHEDULE_TEXT, iteration))
        + LOSS).replace('name: "ip2"', 'name: "%s"' % name))


def solve(folder, prefix, options=(), **solver):
    fields = dict(snapshot=HALF, snapshot_prefix=prefix, max_iter=END)
    fields.update(solver)
    write_solver(folder, name=prefix + ".prototxt", **fields)
    return run_caffe("train", "--solver=%s.prototxt" % prefix, *options,
                     cwd=folder)


def state_of(prefix, form, iteration=HALF):
    return "%s_iter_%d.solverstate%s" % (prefix, iteration, SUFFIX[form])


def resume(folder, form, prefix="resumed", of="whole", at=HALF, **solver):
    return solve(folder, prefix, snapshot_format=form, options=[
        "--snapshot=" + state_of(of, form, at)], **solver)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Makes a folder with a whole run in it; returns its log, too."""
    made = {}

    def get(form, iter_size, iteration):
        kind = form, iter_size, iteration
        if kind not in made:
            folder = tmp_path_factory.mktemp("trained")
            write_data(folder)
            net(folder, iteration)
            made[kind] = folder, solve(folder, "whole", iter_size=iter_size,
                                       snapshot_format=form)
        return made[kind]
    return get


@pytest.fixture
def whole(trained, tmp_path, request):
    """A folder with a run and its snapshots, and the run's log."""
    folder, log = trained(*request.param)
    copy = tmp_path / "run"
    shutil.copytree(folder, copy)
    return copy, log


def of_the_original(folder, form):
    """Makes the snapshot one that knows nothing of passes.

    The models of the authors' fork hold iteration as their prototxt has it:
    its layer never writes it. So do ours.
    """
    if form == "HDF5":
        with h5py.File(folder / state_of("whole", form), "a") as state:
            del state["large_margin_passes"], state["large_margin_iteration"]
        return
    path = folder / ("whole_iter_%d.caffemodel" % HALF)
    from caffe.proto import caffe_pb2
    model = caffe_pb2.NetParameter()
    model.ParseFromString(path.read_bytes())
    layer, = [layer for layer in model.layer if layer.name == "ip2"]
    layer.largemargin_inner_product_param.ClearField("passes")
    path.write_bytes(model.SerializeToString())


def passes_in(folder, prefix, form, iteration):
    """What the snapshot says: (iteration, passes) of the layer ip2."""
    if form == "HDF5":
        with h5py.File(folder / state_of(prefix, form, iteration), "r") as f:
            return (int(f["large_margin_iteration"].attrs["ip2"]),
                    int(f["large_margin_passes"].attrs["ip2"]))
    param = read_model(folder / ("%s_iter_%d.caffemodel" % (
        prefix, iteration)))["ip2"].largemargin_inner_product_param
    return param.iteration, param.passes


def said(log, name="ip2", where=""):
    """[(passes, their source, lambda)] of the lines that tell of a resume."""
    return [(int(passes), source, value) for passes, source, value
            in re.findall(r"LargeMarginInnerProduct layer '%s'%s resumes "
                          r"after (\d+) forward passes \((.*)\), lambda = "
                          r"(\S+)$" % (name, where), log, re.M)]


def shown(passes):
    """lambda of that pass as Caffe's log shows it: a float, six digits."""
    return "%.6g" % np.float32(lambda_at(passes, **SCHEDULE))


def check_from(log, passes, iter_size, start=HALF, end=END):
    """The log goes on after so many passes, and says so."""
    assert logged_lambdas(log) == [
        (start + i, shown(passes + iter_size * (i + 1)))
        for i in range(end - start)]
    (at, _, value), = said(log)
    assert at == passes
    assert float(value) == pytest.approx(lambda_at(passes + 1, **SCHEDULE),
                                         rel=1e-5)


@pytest.mark.parametrize("whole, kind", zip(KINDS, KINDS),
                         indirect=["whole"], ids=map(str, KINDS))
def test_goes_on(whole, kind):
    folder, log = whole
    form, iter_size, iteration = kind
    resumed = resume(folder, form, iter_size=iter_size)
    assert "resumes" not in log
    assert [step for step, _ in logged_lambdas(log)] == list(range(END))
    assert logged_lambdas(resumed) == logged_lambdas(log)[HALF:]
    check_from(resumed, iteration + iter_size * HALF, iter_size)
    assert said(resumed)[0][1] == "of the snapshot"
    model = "%%s_iter_%d.caffemodel%s" % (END, SUFFIX[form])
    assert_same_weights(folder / (model % "whole"),
                        folder / (model % "resumed"))
    # What the user wrote stays what it was.
    for run in ("whole", "resumed"):
        assert passes_in(folder, run, form, END) == (
            iteration, iteration + iter_size * END)


@pytest.mark.parametrize("whole, kind", zip(KINDS, KINDS),
                         indirect=["whole"], ids=map(str, KINDS))
def test_snapshot_of_the_original(whole, kind):
    folder, _ = whole
    form, iter_size, iteration = kind
    of_the_original(folder, form)
    resumed = resume(folder, form, iter_size=iter_size)
    check_from(resumed, max(iteration, iter_size * HALF), iter_size)
    assert "of the solver's iterations" in said(resumed)[0][1]


# By hand as with the original: an iteration of the prototxt that is equal to
# the count, above it, and below.
@pytest.mark.parametrize("original", (False, True))
@pytest.mark.parametrize("by_hand", ("equal", "higher", "lower"))
@pytest.mark.parametrize("whole, kind", zip(KINDS, KINDS),
                         indirect=["whole"], ids=map(str, KINDS))
def test_by_hand(whole, kind, by_hand, original):
    folder, log = whole
    form, iter_size, iteration = kind
    count = iter_size * HALF
    if original:
        of_the_original(folder, form)
    else:
        count += iteration
    written = {"equal": count, "higher": 500, "lower": 3}[by_hand]
    net(folder, written)
    resumed = resume(folder, form, iter_size=iter_size)
    check_from(resumed, max(count, written), iter_size)
    by_the_user = said(resumed)[0][1].startswith("iteration of the prototxt")
    assert by_the_user == (by_hand == "higher")
    if by_hand == "equal" and (not original or not iteration):
        assert logged_lambdas(resumed) == logged_lambdas(log)[HALF:]


@pytest.mark.parametrize("whole, kind", zip(KINDS, KINDS),
                         indirect=["whole"], ids=map(str, KINDS))
def test_goes_on_a_second_time(whole, kind):
    folder, _ = whole
    form, iter_size, iteration = kind
    resume(folder, form, iter_size=iter_size)
    again = resume(folder, form, "again", "resumed", END, iter_size=iter_size,
                   max_iter=END + HALF)
    check_from(again, iteration + iter_size * END, iter_size, END, END + HALF)
    assert passes_in(folder, "again", form, END + HALF) == (
        iteration, iteration + iter_size * (END + HALF))


@pytest.mark.parametrize("whole, kind", zip(KINDS, KINDS),
                         indirect=["whole"], ids=map(str, KINDS))
def test_a_layer_of_another_name_goes_by_the_solver(whole, kind):
    folder, _ = whole
    form, iter_size, iteration = kind
    net(folder, iteration, "renamed")
    resumed = resume(folder, form, iter_size=iter_size)
    (passes, source, _), = said(resumed, "renamed")
    assert passes == max(iteration, iter_size * HALF)
    assert "no count of a layer 'renamed'" in source
    assert logged_lambdas(resumed)[0][1] == shown(passes + iter_size)


@pytest.mark.parametrize("whole, kind", zip(KINDS, KINDS),
                         indirect=["whole"], ids=map(str, KINDS))
def test_restore_of_pycaffe(whole, kind, monkeypatch):
    import caffe
    folder, _ = whole
    form, iter_size, iteration = kind
    monkeypatch.chdir(folder)
    solver = caffe.SGDSolver(str(write_solver(
        folder, name="py.prototxt", iter_size=iter_size, display=0,
        snapshot_format=form, snapshot_prefix="py")))
    # A count that is to be forgotten.
    solver.step(20)
    solver.restore(state_of("whole", form))
    solver.step(1)
    count = iteration + iter_size * (HALF + 1)
    assert float(solver.net.blobs["lambda"].data[0]) == pytest.approx(
        lambda_at(count, **SCHEDULE), rel=1e-6)
    solver.snapshot()
    assert passes_in(folder, "py", form, HALF + 1) == (iteration, count)


def test_a_model_that_pycaffe_saved_again(data):
    """Surgery between snapshot and resume does not count."""
    import caffe
    net(data)
    solve(data, "whole", iter_size=2)
    model = str(data / ("whole_iter_%d.caffemodel" % HALF))
    edited = caffe.Net("net.prototxt", model, caffe.TRAIN)
    edited.forward()
    edited.save(model)
    check_from(resume(data, "BINARYPROTO", iter_size=2), 2 * HALF, 2)


@pytest.mark.parametrize("form", SUFFIX)
def test_weights_start_lambda_afresh(data, form):
    net(data, 7)
    solve(data, "whole", snapshot_format=form)
    fresh = solve(data, "fresh", options=[
        "--weights=whole_iter_%d.caffemodel%s" % (END, SUFFIX[form])])
    assert logged_lambdas(fresh) == [
        (step, shown(7 + step + 1)) for step in range(END)]
    assert "resumes" not in fresh


@pytest.mark.parametrize("form", SUFFIX)
def test_a_net_without_margin_layer_resumes_as_ever(data, form):
    text = data_layer() + IP1.replace("ip1", "ip2").replace(
        "num_output: 6", "num_output: 4") + LOSS
    write_net(data, text)
    whole = solve(data, "whole", snapshot_format=form)
    resumed = resume(data, form)
    assert "resumes" not in whole + resumed
    model = "%%s_iter_%d.caffemodel%s" % (END, SUFFIX[form])
    assert_same_weights(data / (model % "whole"), data / (model % "resumed"))
    if form == "HDF5":
        with h5py.File(data / state_of("whole", form), "r") as state:
            # SSD's Caffe has more of its own.
            assert set(state) >= {"iter", "learned_net", "current_step",
                                  "history"}
            assert "large_margin_passes" not in state


@pytest.mark.parametrize("form", SUFFIX)
def test_two_margin_layers_resume_each_for_itself(data, form):
    second = margin_layer("margin: 2 base: 3 gamma: 1 iteration: 9",
                          tops=("other", "other_lambda")).replace(
                              'name: "ip2"', 'name: "other"')
    write_net(data, data_layer() + IP1 + margin_layer(
        "type: QUADRUPLE " + SCHEDULE_TEXT) + LOSS + second)

    def both(log):
        return re.findall(r"output #\d+: ((?:other_)?lambda = \S+)", log)

    whole = solve(data, "whole", snapshot_format=form)
    resumed = resume(data, form)
    assert len(both(whole)) == 2 * END
    assert both(resumed) == both(whole)[2 * HALF:]
    assert said(resumed)[0][0] == HALF
    assert said(resumed, "other")[0][0] == 9 + HALF


# ---- Test nets, which no snapshot holds ----

TEST_SOLVER = dict(test_interval=4, test_iter=2)


def test_lambdas(log):
    """{(iteration, test net): lambda} of a log."""
    found, at = {}, None
    for line in log.splitlines():
        test = re.search(r"Iteration (\d+), Testing net \(#(\d)\)", line)
        if test:
            at = int(test.group(1)), int(test.group(2))
        value = re.search(r"Test net output #\d+: lambda = (\S+)", line)
        if value:
            found[at] = value.group(1)
    return found


test_lambdas.__test__ = False


@pytest.mark.parametrize("form", SUFFIX)
@pytest.mark.parametrize("iter_size, iteration, interval, at_start", [
    (1, 0, 4, True), (2, 7, 4, False),
    # A test is due where the run goes on: it was not made before.
    (2, 0, 3, True), (1, 7, 3, False)])
def test_test_nets_go_on(data, form, iter_size, iteration, interval,
                         at_start):
    net(data, iteration)
    options = dict(iter_size=iter_size, test_interval=interval,
                   test_initialization=at_start)
    # Two test nets, of 2 and of 3 passes a test.
    solver = "test_iter: 2\ntest_iter: 3\n"

    def run(prefix, **more):
        write_solver(data, name=prefix + ".prototxt", snapshot=HALF,
                     snapshot_prefix=prefix, snapshot_format=form,
                     max_iter=END, **options)
        path = data / (prefix + ".prototxt")
        path.write_text(path.read_text() + solver)
        return run_caffe("train", "--solver=%s" % path, cwd=data, *more.get(
            "options", ()))

    whole = test_lambdas(run("whole"))
    resumed_log = run("resumed", options=[
        "--snapshot=" + state_of("whole", form)])
    resumed = test_lambdas(resumed_log)
    due = [at for at in range(0, END + 1, interval)
           if at > 0 or at_start]
    assert sorted(whole) == list(itertools.product(due, (0, 1)))
    assert resumed == {at: value for at, value in whole.items()
                       if at[0] >= HALF}
    tests = len([at for at in due if at < HALF])
    for number, passes in enumerate((2, 3)):
        (count, source, _), = said(
            resumed_log, where=" of test net #%d" % number)
        assert count == iteration + tests * passes
        assert source == "of the tests so far"


# As the README has it, and as the authors' nets do.
WITHOUT_MARGIN = [
    dict(bottoms=("ip1",), tops=("ip2",)),
    dict(param="type: SINGLE base: 0", tops=("ip2",))]


@pytest.mark.parametrize("test_layer", WITHOUT_MARGIN)
def test_test_layers_without_margin_have_no_lambda(data, test_layer):
    both = (data_layer() + IP1 + margin_layer(
        "type: QUADRUPLE " + SCHEDULE_TEXT,
        extra="include { phase: TRAIN }") + margin_layer(
            extra="include { phase: TEST }", **test_layer) + LOSS)
    write_net(data, both)
    solve(data, "whole", **TEST_SOLVER)
    log = resume(data, "BINARYPROTO", **TEST_SOLVER)
    assert said(log) and "of test net" not in log


@pytest.mark.parametrize("form", SUFFIX)
@pytest.mark.parametrize("original", (False, True))
def test_test_nets_by_hand(data, form, original):
    """A count by hand is not added to that of the tests either."""
    net(data)
    solve(data, "whole", snapshot_format=form, **TEST_SOLVER)
    if original:
        of_the_original(data, form)
    for written, count in ((500, 500), (3, 4)):
        net(data, written)
        resumed = resume(data, form, **TEST_SOLVER)
        assert said(resumed, where=" of test net #0")[0][0] == count
        first = min(test_lambdas(resumed))
        assert float(test_lambdas(resumed)[first]) == pytest.approx(sum(
            lambda_at(count + i, **SCHEDULE) for i in (1, 2)) / 2, rel=1e-5)


@pytest.mark.parametrize("form", SUFFIX)
def test_caffe_test_starts_with_the_passes_of_the_model(data, form):
    net(data, 7)
    solve(data, "whole", snapshot_format=form, iter_size=2)
    log = run_caffe(
        "test", "--model=net.prototxt", "--iterations=2",
        "--weights=whole_iter_%d.caffemodel%s" % (END, SUFFIX[form]),
        cwd=data)
    assert said(log)[0][:2] == (7 + 2 * END, "of the model")
    assert re.findall(r"Batch \d, lambda = (\S+)", log) == [
        shown(7 + 2 * END + i) for i in (1, 2)]


@pytest.mark.parametrize("test_layer", WITHOUT_MARGIN)
def test_caffe_test_says_no_lambda_of_a_layer_without_margin(
        data, test_layer):
    net(data)
    solve(data, "whole")
    write_net(data, data_layer() + IP1 + margin_layer(**test_layer) + LOSS)
    log = run_caffe("test", "--model=net.prototxt", "--iterations=1",
                    "--weights=whole_iter_%d.caffemodel" % END, cwd=data)
    assert "resumes" not in log and "Batch 0, loss" in log


def test_caffe_test_without_a_count_starts_at_iteration(data):
    """A model of the original, and an HDF5 one without its solver's state."""
    net(data, 7)
    solve(data, "whole")
    of_the_original(data, "BINARYPROTO")
    solve(data, "h5", snapshot_format="HDF5")
    (data / state_of("h5", "HDF5")).unlink()
    for model in ("whole_iter_%d.caffemodel", "h5_iter_%d.caffemodel.h5"):
        log = run_caffe("test", "--model=net.prototxt", "--iterations=1",
                        "--weights=" + model % HALF, cwd=data)
        assert "resumes" not in log
        assert re.findall(r"Batch \d, lambda = (\S+)", log) == [
            shown(8)]
