"""Figures of a compression: dots are where their numbers say, and every layer's sizes are told."""

import re

from gristmill.report.figures import Points, dependency_picture, layers_picture, scatter_plot


def test_dots_lie_where_their_numbers_are_and_names_are_escaped() -> None:
    dots = [(1.0, 0.0, "parent"), (1.5, 0.2, "<b>child</b>"), (2.0, 0.4, "fast")]
    picture = scatter_plot([Points("greedy", "search", dots, joined=True), Points("before", "greedy", [])], x_label="speed", y_label="KL")
    places = [tuple(map(float, one)) for one in re.findall(r'cx="([\d.]+)" cy="([\d.]+)" r="4.5"', picture)][:3]
    assert places[0][0] < places[1][0] < places[2][0] and places[0][1] > places[1][1] > places[2][1]
    assert places[1] == tuple((a + b) / 2 for a, b in zip(places[0], places[2], strict=True)), "halfway is halfway"
    assert "<b>" not in picture and "&lt;b&gt;child" in picture and picture.count("<polyline") == 1
    assert "before" not in picture, "a kind without dots is not named"


def test_every_layer_is_drawn_with_its_sizes() -> None:
    parent = [{"kv_heads": 2, "ffn_size": 512}] * 2
    picture = layers_picture(parent, [{"kv_heads": 1, "ffn_size": 0}, {"kv_heads": 0, "ffn_size": 256}])
    for words in ("layer 0: 1 of 2", "layer 0: 0 of 512", "layer 1: 256 of 512", ">none<"):
        assert words in picture
    heights = dict(re.findall(r'height="([\d.]+)"[^>]*class="(greedy)"', picture))
    assert set(heights) == {"30"} or set(map(float, heights)) == {30.0}, "half of the widest is half as high"


def test_a_dependency_is_drawn_the_darker_the_larger_and_what_is_fused_is_framed() -> None:
    picture = dependency_picture([1, 3, 4], [[0, 0.5, 0.25], [0, 0, 0.0625], [0, 0, 0]], [[3, 4]])
    cells = re.findall(r'fill-opacity="([\d.]+)" class="([a-z ]+)"><title>([^<]+)', picture)
    assert cells == [
        ("0.55", "after", "layer 3 on layer 1: 0.5000"),
        ("0.3", "after", "layer 4 on layer 1: 0.2500"),
        ("0.11", "after mark", "layer 4 on layer 3: 0.0625"),
    ]
