"""Moving pictures: they end as the still picture, leave it as it was, and stay small."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from gdfunc import plot

from . import drawings
from .assertions import assert_refused
from .pictures import descend, quadratic

MOVING = [drawings.curves, drawings.descent, drawings.one_parameter, drawings.crowd]
each_picture = pytest.mark.parametrize("draw", MOVING)


def saved(figure, **options):
    page = io.BytesIO()
    figure.savefig(page, format="png", **options)
    return page.getvalue()


def pixels(png):
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def gif_frames(file):
    with Image.open(file) as image:
        for i in range(image.n_frames):
            image.seek(i)
            yield np.asarray(image.convert("RGB")).astype(int)


def html_frames(file):
    """Put the frames of a page over one another, as its script does."""
    sources = json.loads(re.search(r"const sources = (\[.*?\])", file.read_text()).group(1))
    canvas = None
    for source in sources:
        kind, _, text = source.partition(",")
        assert kind == "data:image/png;base64"
        layer = Image.open(io.BytesIO(base64.b64decode(text))).convert("RGBA")
        canvas = layer if canvas is None else Image.alpha_composite(canvas, layer)
        yield np.asarray(canvas.convert("RGB")).astype(int)


FRAMES = {".gif": gif_frames, ".html": html_frames}
each_kind = pytest.mark.parametrize("kind", FRAMES)


def inked(frame, color):
    """Tell which pixels are of about this colour."""
    return np.abs(frame - 255 * np.array(to_rgb(color))).max(axis=2) < 40


@pytest.mark.long
@each_picture
def test_last_frame_of_a_page_is_the_still_picture(draw, tmp_path):
    *earlier, last = html_frames(plot.animate(draw(None), tmp_path / "x.html", frames=5, dpi=60))
    still = pixels(saved(draw(None).figure, dpi=60))
    assert earlier
    assert np.array_equal(last, still)
    assert all((frame != still).any() for frame in earlier)


@pytest.mark.long
@each_picture
def test_last_frame_of_a_gif_is_the_still_picture_in_the_colours_of_the_gif(draw, tmp_path):
    file = plot.animate(draw(None), tmp_path / "x.gif", frames=5, dpi=60)
    *_, last = gif_frames(file)
    still = pixels(saved(draw(None).figure, dpi=60))
    with Image.open(file) as image:
        palette = np.array(image.getpalette()).reshape(-1, 3)[:255]
    errors = ((last - still) ** 2).sum(axis=2)
    least = np.full(errors.shape, np.inf)
    for color in palette:
        least = np.minimum(least, ((still - color) ** 2).sum(axis=2))
    assert np.array_equal(errors, least)
    assert np.sqrt(errors).mean() < 1


@pytest.mark.long
@each_kind
@each_picture
def test_figure_is_left_as_it_was(draw, kind, tmp_path):
    ax, twin = draw(None), draw(None)
    engine, canvas, dpi = ax.figure.get_layout_engine(), ax.figure.canvas, ax.figure.dpi
    plot.animate(ax, tmp_path / f"x{kind}", frames=4, dpi=50)
    assert (ax.figure.get_layout_engine(), ax.figure.canvas, ax.figure.dpi) == (engine, canvas, dpi)
    for _ in range(2):  # a layout begins at the one before
        assert saved(ax.figure) == saved(twin.figure)


@pytest.mark.long
def test_figure_is_left_as_it_was_when_a_frame_fails(tmp_path, monkeypatch):
    ax, twin = drawings.descent(None), drawings.descent(None)
    monkeypatch.setattr("gdfunc.plot._movie.Gif.add", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plot.animate(ax, tmp_path / "x.gif", frames=4)
    assert saved(ax.figure) == saved(twin.figure)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
@each_kind
def test_lines_grow_with_the_steps(kind, tmp_path):
    ax = Figure((4, 3)).subplots()
    plot.plot_curves([torch.full((101,), 2.0)], ax=ax, log_y=False)
    color = ax.lines[0].get_color()
    ax.get_legend().remove()
    frames = [*FRAMES[kind](plot.animate(ax, tmp_path / f"x{kind}", frames=11))]
    columns = [np.flatnonzero(inked(frame, color).any(axis=0)) for frame in frames]
    ends = ax.transData.transform([(10 * i, 2.0) for i in range(11)])[:, 0]
    assert len(frames) == 11
    assert [c.max() for c in columns[1:]] == pytest.approx(ends[1:], abs=2.5)


@pytest.mark.long
def test_steps_of_logarithmic_spacing_are_a_geometric_sequence(tmp_path):
    ax = plot.plot_curves([torch.arange(1.0, 66.0)])
    seen = steps_of_frames(ax, tmp_path, frames=8, spacing="log")
    assert seen == [0, 1, 2, 4, 8, 16, 32, 64]


def steps_of_frames(ax, folder, **options):
    """Return the last step that the first line has in each frame."""
    (line, *_), seen = ax.lines, []
    draw = type(line).draw
    line.draw = lambda renderer: seen.append(len(line.get_xdata()) - 1) or draw(line, renderer)
    plot.animate(ax, folder / "x.gif", dpi=40, **options)
    return seen[1:] + seen[:1]  # the still picture is drawn first, and is the last frame


@pytest.mark.long
@pytest.mark.parametrize("frames", [2, 3, 7, 100])
def test_frames_are_evenly_spaced_from_the_start_to_the_end(frames, tmp_path):
    seen = steps_of_frames(plot.plot_curves([torch.arange(1.0, 302.0)]), tmp_path, frames=frames)
    assert len(seen) == frames
    assert seen == [int(300 * i / (frames - 1) + 1e-9) for i in range(frames)]


@pytest.mark.long
def test_a_short_run_has_a_frame_for_each_step_and_takes_as_long(tmp_path):
    ax = plot.plot_curves([torch.tensor([4.0, 2.0, 1.0, 0.5, 0.25])])
    file = plot.animate(ax, tmp_path / "x.gif", frames=100, seconds=5, hold=3)
    with Image.open(file) as image:
        waits = []
        for i in range(image.n_frames):
            image.seek(i)
            waits.append(image.info["duration"])
    assert len(waits) == 5
    assert sum(waits) == pytest.approx(8000, abs=120)
    assert waits[-1] == pytest.approx(3000, abs=60)


@pytest.mark.long
def test_several_axes_arrive_together(tmp_path):
    axes = Figure().subplots(1, 2)
    runs = [torch.arange(1.0, 12.0), torch.arange(1.0, 1002.0)]
    for ax, run in zip(axes, runs, strict=True):
        plot.plot_curves([run], ax=ax)
    seen = [[], []]
    for ax, found in zip(axes, seen, strict=True):
        line = ax.lines[0]
        line.draw = lambda _renderer, line=line, found=found: found.append(len(line.get_xdata()) - 1)
    plot.animate(list(axes), tmp_path / "x.gif", frames=6, dpi=40)
    still, *frames = zip(*seen, strict=True)
    assert still == (10, 1000)
    assert frames == [(0, 0), (2, 200), (4, 400), (6, 600), (8, 800)]


@pytest.mark.long
def test_the_mark_at_the_end_travels_along_the_path(tmp_path):
    path = descend(0.05, 10)
    ax = plot.plot_descent(quadratic, [path])
    (end,) = (line for line in ax.lines if line.get_marker() == "D")
    seen, draw = [], type(end).draw
    end.draw = lambda renderer: seen.append(end.get_xydata()[0].tolist()) or draw(end, renderer)
    plot.animate(ax, tmp_path / "x.gif", frames=11, dpi=40)
    assert seen[1:] + seen[:1] == path.tolist()


@pytest.mark.long
def test_view_of_a_run_that_diverges_is_that_of_the_picture(tmp_path):
    ax = plot.plot_descent(quadratic, [descend(0.205, 30)])
    limits, seen = (ax.get_xlim(), ax.get_ylim()), []
    (cross,) = (line for line in ax.lines if line.get_marker() == "x")
    cross.draw = lambda _: seen.append(((ax.get_xlim(), ax.get_ylim()), len(cross.get_xdata())))
    plot.animate(ax, tmp_path / "x.gif", dpi=40)
    assert {found for found, _ in seen} == {limits}
    assert [count for _, count in seen[1:]] == [0] * 12 + [1] * (len(seen) - 13)  # leaves at step 12


@pytest.mark.long
def test_a_band_grows_with_its_line(tmp_path):
    ax = plot.plot_curves([torch.linspace(1, 2, 5)[:, None] * torch.arange(1.0, 12.0)])
    (band,), seen = ax.collections, []
    band.draw = lambda _: seen.append(max(path.vertices[:, 0].max() for path in band.get_paths()))
    plot.animate(ax, tmp_path / "x.gif", frames=6, dpi=40)
    assert seen == [10, 0, 2, 4, 6, 8]


@pytest.mark.long
def test_legend_at_the_best_place_stays_where_it_is(tmp_path):
    rising = torch.arange(1.0, 12.0)
    ax = plot.plot_curves({"one": rising, "two": 2 * rising}, ax=Figure().subplots(), log_y=False)
    legend, seen = ax.get_legend(), []
    draw = type(legend).draw
    legend.draw = lambda renderer: draw(legend, renderer) or seen.append(legend.get_window_extent().p0)
    plot.animate(ax, tmp_path / "x.gif", frames=5)
    assert len(seen) == 5
    assert np.abs(np.array(seen) - seen[0]).max() < 1e-6
    legend.set_loc("upper left")
    legend.set_loc("best")  # as before: it can still be moved


@pytest.mark.long
def test_lines_of_ones_own_grow_too(tmp_path):
    ax = Figure((3, 3)).subplots()
    (line,) = ax.plot([0.0, 1.0, 2.0], [0.0, 1.0, 0.0], marker="o", markevery=[-1])
    frames = [*gif_frames(plot.animate(ax, tmp_path / "x.gif", lines=[line]))]
    assert len(frames) == 3
    assert line.get_xdata().tolist() == [0.0, 1.0, 2.0]
    first, second, third = (inked(frame, line.get_color()).sum() for frame in frames)
    assert 0 < first < second < third


@pytest.mark.long
def test_a_page_needs_no_network_and_names_the_picture(tmp_path):
    ax = drawings.descent(None)
    ax.figure.suptitle('A "steep" valley & a\nrun <b>')
    page = plot.animate(ax, tmp_path / "x.html", frames=3, dpi=40).read_text()
    assert not re.search(r"https?:|src=\"(?!data:)|@\w+@", page)
    assert "<title>A &quot;steep&quot; valley &amp; a run &lt;b&gt;</title>" in page


@pytest.mark.long
def test_a_file_that_is_too_large_is_made_with_fewer_dots(tmp_path, monkeypatch):
    ax = drawings.curves(None)
    size = plot.animate(ax, tmp_path / "x.html", frames=4).stat().st_size
    monkeypatch.setattr("gdfunc.plot._animate._LARGEST", size // 2)
    with pytest.warns(UserWarning, match=r"x.html has \d\d dots per inch instead of 100, for 2 MB"):
        file = plot.animate(ax, tmp_path / "x.html", frames=4)
    assert file.stat().st_size <= size // 2
    monkeypatch.setattr("gdfunc.plot._animate._LARGEST", 3000)
    assert_refused(lambda: plot.animate(ax, tmp_path / "x.html", frames=4), "per inch, and 2 is the most")
    assert file.stat().st_size > 3000  # the file before is still there


CURVES = [torch.tensor([2.0, 1.0])]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "x.mp4"}, r"path must end in .gif or .html; got 'x.mp4'"),
        ({"frames": 1}, "frames .*2"),
        ({"frames": 101}, "frames .*100"),
        ({"frames": 2.5}, "frames"),
        ({"spacing": "even"}, "spacing must be 'linear' or 'log'; got 'even'"),
        ({"seconds": 0}, "seconds must be > 0"),
        ({"hold": -1}, "hold must be > 0"),
        ({"dpi": float("nan")}, "dpi must be a finite number"),
        ({"ax": 3}, "TypeError: ax must be an Axes, or a list or tuple of them; got int"),
        ({"ax": []}, "ax must hold axes of one figure; got 0 axes of 0 figures"),
        ({"lines": 3}, "TypeError: lines must be a list or tuple"),
        ({"lines": [3]}, r"TypeError: lines\[0\] must be a Line2D"),
        ({"lines": [Figure().subplots().plot([1, 2])[0]]}, r"lines\[0\] is not in ax"),
    ],
)
def test_arguments_that_make_no_picture_are_refused(arguments, message, tmp_path):
    ax = plot.plot_curves(CURVES)
    assert_refused(lambda: plot.animate(**{"ax": ax, "path": tmp_path / "x.gif", **arguments}), message)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_axes_of_two_figures_are_refused(tmp_path):
    axes = [plot.plot_curves(CURVES) for _ in range(2)]
    assert_refused(lambda: plot.animate(axes, tmp_path / "x.gif"), "2 axes of 2 figures")


@pytest.mark.parametrize("draw", [lambda: Figure().subplots(), lambda: plot.plot_curves([torch.ones(1)])])
def test_axes_in_which_nothing_moves_are_refused(draw, tmp_path):
    assert_refused(lambda: plot.animate(draw(), tmp_path / "x.gif"), "nothing in the axes moves")


@pytest.mark.long
def test_a_line_whose_data_was_set_again_is_refused(tmp_path):
    ax = plot.plot_curves(CURVES)
    ax.lines[0].set_data([0.0], [1.0])
    assert_refused(lambda: plot.animate(ax, tmp_path / "x.gif"), "2 steps has 1 points")


@pytest.mark.long
def test_a_landscape_moves_with_the_losses_beside_it(tmp_path):
    points = torch.tensor([[3.0, 2.0, 1.0], [2.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    ax = plot.plot_landscape(lambda w, _: (w**2).sum(), [points], resolution=5)
    beside, seen = ax.figure.axes[-1], []
    line = beside.lines[0]
    line.draw = lambda _: seen.append(len(line.get_xdata()))
    plot.animate([ax, beside], tmp_path / "x.gif", dpi=40)
    assert seen == [3, 1, 2]
