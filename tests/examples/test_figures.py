"""What the plots of myexamples have in common."""
import glob
import itertools
import os
import re
import sys

import numpy as np
import pytest

from conftest import ROOT

sys.path.insert(0, os.path.join(ROOT, "myexamples"))
import plot_angles  # noqa: E402
import plot_lambda  # noqa: E402
import plot_psi  # noqa: E402
from caffe_proto import UserError  # noqa: E402

# Of linear RGB, as who lacks the receptors for red, or for green, sees it
# (Vienot, Brettel and Mollon, 1999).
BLINDNESS = {
    "protanopia": [[0.11238, 0.88762, 0], [0.11238, 0.88762, 0],
                   [0.00401, -0.00401, 1]],
    "deuteranopia": [[0.29275, 0.70725, 0], [0.29275, 0.70725, 0],
                     [-0.02234, 0.02234, 1]],
}


def seen(colours, matrix):
    """Colours as they are seen, in CIELAB."""
    color = pytest.importorskip("skimage.color")
    linear = np.where(colours <= 0.04045, colours / 12.92,
                      ((colours + 0.055) / 1.055) ** 2.4)
    linear = np.clip(linear @ np.array(matrix).T, 0, 1)
    back = np.where(linear <= 0.0031308, 12.92 * linear,
                    1.055 * linear ** (1 / 2.4) - 0.055)
    return color.rgb2lab(back[None])[0]


@pytest.mark.parametrize("matrix", BLINDNESS.values(), ids=BLINDNESS)
def test_curves_are_told_apart_without_red_or_green(matrix):
    figure = plot_psi.draw([1, 2, 3, 4], [0])
    from matplotlib.colors import to_rgb
    colours = np.array([to_rgb(line.get_color())
                        for line in figure.axes[0].get_lines()])
    assert len(colours) == 4
    for one, other in itertools.combinations(seen(colours, matrix), 2):
        assert np.linalg.norm(one - other) > 15


def test_the_file_that_is_named_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, made in (("a", "a.png"), ("b.svg", "b.svg"),
                       ("c.d/e", "c.d/e.png")):
        (tmp_path / made).parent.mkdir(exist_ok=True)
        plot_lambda.figures.save(plot_psi.draw([2], [0]), name)
        assert capsys.readouterr().out == "plot: %s\n" % made
        assert (tmp_path / made).stat().st_size > 1000
    with pytest.raises(UserError, match="cannot write none/f.png: "):
        plot_lambda.figures.save(plot_psi.draw([2], [0]), "none/f")


def within(text, figure):
    """Whether all of a text is in the picture."""
    figure.canvas.draw()
    box = text.get_window_extent()
    return box.x0 >= 0 and box.x1 <= figure.bbox.x1


def test_long_paths_keep_the_file(pb):
    path = "a/folder/" * 20 + "the_solver.prototxt"
    solver = pb.SolverParameter(max_iter=1000, base_lr=0.1, lr_policy="fixed")
    figure = plot_lambda.draw([plot_lambda.Descent(
        solver, pb.LargeMarginInnerProductParameter(type=3, base=1000),
        "ip2", "ip2")], path)
    title = figure.axes[0].title
    assert title.get_text().endswith("/the_solver.prototxt")
    assert within(title, figure)


def test_models_of_one_margin_are_told_apart():
    weights, labels = np.eye(2), np.arange(9) % 2
    angles = plot_angles.Angles(weights[labels], labels, weights)
    figure = plot_angles.draw([(plot_angles.panel_name(
        "a/folder/" * 9 + "m4_seed%d/model_iter_6000.caffemodel" % seed,
        "m = 4"), angles) for seed in (1, 2)], "angles")
    for seed, axis in enumerate(figure.axes, 1):
        assert re.fullmatch(
            r"\.\.\..*/m4_seed%d/model_iter_6000\.caffemodel: m = 4, median "
            r"gap 90\.0 degrees" % seed, axis.get_title())
        assert within(axis.title, figure)


def test_colours_are_the_palettes():
    for path in glob.glob(os.path.join(ROOT, "myexamples/**/*.py"),
                          recursive=True):
        with open(path) as file:
            assert "tab:" not in file.read(), path


def test_many_names_do_not_lie_over_the_curves(pb):
    solver = pb.SolverParameter(max_iter=1000, base_lr=0.1, lr_policy="fixed")
    param = pb.LargeMarginInnerProductParameter(
        type=3, base=1000, gamma=0.1, power=2)
    descents = [plot_lambda.Descent(
        solver, param, "ip2", "a_folder_with_a_long_name/solver_%d.prototxt"
        % i) for i in range(6)]
    figure = plot_lambda.draw(descents, "compared")
    figure.canvas.draw()
    axis, = [axis for axis in figure.axes if axis.get_legend()]
    legend = axis.get_legend().get_window_extent()
    assert not legend.overlaps(axis.get_window_extent())
    assert legend.y0 >= 0 and legend.x0 >= 0
    assert not legend.overlaps(axis.xaxis.label.get_window_extent())
