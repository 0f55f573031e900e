"""The picture: both files are written, each curve is named, and a broken model stays in view."""

import matplotlib.image

from jaxlm.evaluation.charts import ROOM, draw_loss_by_position
from jaxlm.evaluation.loss import LossByPosition


def test_curves_are_drawn_and_named(tmp_path):
    starts = tuple(range(0, 256, 64))
    curves = {
        "rope": LossByPosition(starts, (4.0, 3.9, 60.0, 90.0), 256, 2),
        "rope + lm_infinite": LossByPosition(starts, (4.0, 3.9, 3.9, 3.9), 256, 2),
    }
    draw_loss_by_position(curves, 128, tmp_path / "curves.png")
    picture = matplotlib.image.imread(tmp_path / "curves.png")
    assert picture.shape[0] > 400 and picture.std() > 0.05
    drawing = (tmp_path / "curves.svg").read_text()
    for text in ("rope + lm_infinite", "trained to 128", "nats a token"):
        assert f"<!-- {text}" in drawing or text in drawing
    assert ROOM < 10  # else the broken curve would squeeze the good ones flat
