"""The page of a sweep in a browser: the curve is drawn from the numbers, in colours of its own."""

from __future__ import annotations

from tests.report.test_html import Open, browser, show
from tests.sweep.records import EXAMPLE, NONE, point, sweep

__all__ = ["browser", "show"]  # fixtures


def test_the_curve_has_a_line_for_the_method_and_each_control(show: Open) -> None:
    opened = show(EXAMPLE)
    traces = {trace["name"]: trace for trace in opened.chart("curve")}
    assert list(traces) == [
        "no adapter",
        "the adapter as it is",
        "Safe LoRA",
        "uniform shrink",
        "random projector",
        "the smallest that reaches it",
    ]
    method = traces["Safe LoRA"]
    assert (method["x"], method["y"]) == ([0.91, 0.99], [0.6, 0.2])
    low, high = EXAMPLE.refusal(EXAMPLE.points[1].method.rates).interval
    assert method["error_x"]["arrayminus"][0] == 0.91 - low
    assert method["error_x"]["array"][0] == high - 0.91
    colours = [trace["line"]["color"] for trace in traces.values() if "line" in trace]
    assert len(set(colours)) == len(colours)
    assert opened.page.locator("#curve svg").count() > 0
    assert opened.page.locator("#curve .errorbar path").count() > 0


def test_the_table_has_every_trial_and_sorts(show: Open) -> None:
    opened = show(EXAMPLE)
    assert len(opened.column("trials", 1)) == 2 + 2 * 3
    opened.page.locator("#trials thead button", has_text="harm: refused").click()
    shares = [float(each) for each in opened.column("trials", 6)]
    assert shares == sorted(shares)


def test_names_are_shown_and_not_run(show: Open) -> None:
    opened = show(sweep(NONE, point(2, method=(95, 60)), name="<img src=x onerror=alert(1)>"))
    assert opened.page.locator("img").count() == 0
    assert "onerror" in opened.page.inner_text("main")
