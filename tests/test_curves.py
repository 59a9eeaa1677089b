"""Pictures of runs, from metrics that a running run may still be writing."""

import json
import sys
import xml.etree.ElementTree as ElementTree

import pytest

from scripts import curves
from viewer import plots

SVG = "{http://www.w3.org/2000/svg}"


def run(folder, lines, torn=""):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines) + torn)
    return folder


def drawn(text):
    """(titles, number of points of each curve, all texts)."""
    root = ElementTree.fromstring(text)
    texts = [t.text for t in root.iter(f"{SVG}text")]
    lines = [p.get("points").split() for p in root.iter(f"{SVG}polyline") if p.get("stroke-width")]
    return [t.text for t in root.iter(f"{SVG}text") if t.get("font-weight")], list(map(len, lines)), texts


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["curves", *map(str, arguments)])
    curves.main()


def test_a_panel_for_each_reward_and_a_line_for_each_run(tmp_path, monkeypatch):
    """One has a reward that the other has not, a null, a panel of evaluations and a torn last line."""
    one = run(tmp_path / "one", [{"step": 0, "eval/reward/length": 0.2}, {"step": 1, "reward/length": 0.3},
                                 {"step": 2, "reward/length": None, "loss": 1.0},
                                 {"step": 3, "reward/length": 0.5, "eval/reward/length": 0.4}],
              '{"step": 4, "reward/length": 0.')
    two = run(tmp_path / "<two>", [{"step": 1, "reward/length": 0.1, "reward/mine": 7.0}])
    main(monkeypatch, one, two, "--out", tmp_path / "x.svg")
    titles, points, texts = drawn((tmp_path / "x.svg").read_text())
    assert titles == ["eval/reward/length", "reward/length", "reward/mine"] and points == [2, 2, 1, 1]
    assert {str(one), str(two)} <= {*texts}
    main(monkeypatch, one, two, "--metrics", "loss,*mine", "--out", tmp_path / "x.svg")
    assert drawn((tmp_path / "x.svg").read_text())[0] == ["loss", "reward/mine"]


def test_points_stand_where_the_ticks_say(tmp_path):
    """The scale is 0 to 1 for a reward, else from 0 to a round number; a reference is dashed and named."""
    text = plots.picture({"a": {"run": [(0, 0.0), (10, 1.0)], "bar": [(0, 0.5), (10, 0.5)]},
                           "b": {"run": [(0, -3.0), (10, 30.0)]}}, {"run": "red"}, "note")
    root = ElementTree.fromstring(text)
    (a, b) = [[tuple(map(float, xy.split(","))) for xy in p.get("points").split()]
              for p in root.iter(f"{SVG}polyline") if p.get("stroke-width")]
    assert a == [(46, 28 + plots.HEIGHT), (46 + plots.WIDTH, 28)]
    (low, high), marks = (b[0][1] - 28, b[1][1] - 28), plots.ticks(-3, 30)
    assert marks == [-10, 0, 10, 20, 30]
    assert (low, high) == pytest.approx((plots.HEIGHT * 33 / 40, 0), abs=0.06)
    (dashed,) = [p for p in root.iter(f"{SVG}polyline") if p.get("stroke-dasharray")]
    assert len({xy.split(",")[1] for xy in dashed.get("points").split()}) == 1 and ">bar</text>" in text


@pytest.mark.parametrize("low, high", [(0, 1e-13), (0, 0.02), (-0.4, 0.3), (0, 70), (-1e9, 3e9), (-5, 0)])
def test_ticks_are_few_round_and_cover(low, high):
    marks = plots.ticks(low, high)
    assert 3 <= len(marks) <= 6 and marks[0] <= low + 1e-9 * high and marks[-1] >= high * (1 - 1e-9)
    assert 0 in marks and len({f"{m:.4g}" for m in marks}) == len(marks)


def test_what_cannot_be_drawn_is_one_sentence(tmp_path, monkeypatch, capsys):
    one = run(tmp_path / "one", [{"step": 1, "reward/length": 0.3}])
    broken = run(tmp_path / "broken", [], "{}}\n")
    monkeypatch.chdir(tmp_path)
    other = [run(tmp_path / name, [m]) for name, m in (("list", [1]), ("none", {"reward/length": 1}))]
    for arguments, part in (((tmp_path / "gone",), "gone/metrics.jsonl cannot be read"),
                            ((other[0],), "list/metrics.jsonl cannot be read at line 1 (it must be a JSON"),
                            ((other[1],), "none/metrics.jsonl, line 1: step must be a whole number"),
                            ((broken,), "broken/metrics.jsonl cannot be read"),
                            ((one, "--metrics", "lenght"), "they have step, reward/length"),
                            ((one, "--out", tmp_path / "no" / "x.svg"), "No such file"),
                            ((one, "--out", "."), "'.'")):
        with pytest.raises(SystemExit) as stopped:
            main(monkeypatch, *arguments)
        (said,) = capsys.readouterr().err.splitlines()
        assert stopped.value.code == 2 and said.startswith("error: ") and part in said
