"""The report is one file that a real browser opens: all videos decode, nothing errs, nothing is fetched."""

import html.parser
import json
import re
import string
from pathlib import Path

import pytest

from paris_jax.evaluation import report
from paris_jax.evaluation.results import format_estimate
from tests.evaluation import synthetic
from tests.evaluation.browser import browse, needs_browser


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    results, videos = synthetic.make()
    path = tmp_path_factory.mktemp("report") / "report.html"
    report.write_report(results, videos, path, fps=8.0)
    return path


class Tags(html.parser.HTMLParser):
    """Collects tags and checks that they are closed in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.seen = [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


@needs_browser
def test_a_browser_plays_every_video_and_reports_no_error(page):
    visit = browse(page, until="html[data-playing='18']")
    assert visit.data == {"videos": "18 of 18", "settled": "true", "playing": "18"}
    assert visit.logged == []


@needs_browser
def test_a_browser_fetches_nothing(page):
    assert browse(page).asked == []


@needs_browser
def test_a_request_would_be_noticed_and_is_forbidden(page, tmp_path):
    image = '<img src="http://example.invalid/x.png">'
    allowed, forbidden = tmp_path / "allowed.html", tmp_path / "forbidden.html"
    forbidden.write_text(page.read_text().replace("<h1>", f"{image}<h1>", 1))
    allowed.write_text(forbidden.read_text().replace("Content-Security-Policy", "No-Policy"))
    visit = browse(forbidden)
    assert visit.asked == [] and "Content Security Policy" in visit.logged[0]
    assert browse(allowed).asked == ["http://example.invalid/x.png"]


@needs_browser
def test_a_broken_video_is_noticed(page, tmp_path):
    """The check above can fail."""
    text = page.read_text()
    broken = tmp_path / "broken.html"
    broken.write_text(re.sub(r"(data:video/mp4;base64,)[^\"]{200}", r"\1", text, count=1))
    assert browse(broken).data["videos"] == "17 of 18"


@needs_browser
def test_console_errors_are_noticed(page, tmp_path):
    broken = tmp_path / "broken.html"
    broken.write_text(page.read_text().replace("<script>", "<script>undefined_name();", 1))
    assert any("undefined_name" in message for message in browse(broken, until="html").logged)


def test_everything_is_inlined(page):
    text = page.read_text()
    for tag, attributes in Tags(text).seen:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith("data:"), tag
    assert "url(" not in text
    assert "@import" not in text
    assert "${" not in text.replace("`${decoded} of ${videos.length}`", "").replace("`0 of ${videos.length}`", "")


# Every panel, and the marks that its made-up results must leave in it: points, bars, areas or rows.
PANELS = {
    "Accuracy by attribute": ("rect", 3 * 7),  # real clips and two models, seven attributes
    "Flow loss by time": ("circle", 2 * 8),  # two models, eight bins of time
    "Difference by time": ("circle", 8),
    "Flow loss by cluster": ("rect", 2 * 3),
    "Velocity error by time": ("circle", 2 * 8),
    "Router accuracy by time": ("circle", 8),
    "Expert use by step": ("polygon", 3),  # an area an expert
    "Expert use by prompt": ("tr", 3),  # a row a cluster
}


@pytest.mark.parametrize("title", PANELS)
def test_every_plot_is_there_and_draws_what_was_measured(title, page):
    panels = dict(re.findall(r'<figure class="panel[^"]*"><h3>(.*?)</h3>(.*?)</figure>', page.read_text(), re.DOTALL))
    assert panels.keys() == PANELS.keys()
    mark, count = PANELS[title]
    assert len(re.findall(f"<{mark}[ >]", panels[title])) == count


def test_every_score_the_compute_and_the_protocol_are_there(page):
    text, (results, _) = page.read_text(), synthetic.make()
    bodies = re.findall(r"<tbody>(.*?)</tbody>", text, re.DOTALL)
    tables = [re.findall(r"<tr[^>]*>.*?</tr>", body, re.DOTALL) for body in bodies]
    scores = tables[0]
    assert len(scores) == len(results["comparisons"])
    for row, comparison in zip(scores, results["comparisons"], strict=True):
        assert comparison["label"] in row
        assert [format_estimate(comparison[model], comparison["unit"]) in row for model in ("ensemble", "monolith")]
        assert format_estimate(comparison["difference"], comparison["unit"], signed=True) in row
    assert text.count('<section class="tile">') == 3
    (compute,) = (rows for rows in tables if "expert 0" in "".join(rows) and "1,000" in "".join(rows))
    for name in ("expert 0", "expert 1", "expert 2", "monolith", "router"):
        assert sum(name in row for row in compute) == 1
    protocol = dict(re.findall(r"<dt>(.*?)</dt><dd>(.*?)</dd>", text[text.index('class="protocol"') :]))
    told = results["protocol"]
    versions = ", ".join(f"{name} {version}" for name, version in told["versions"].items())
    assert protocol == {name: str(value) for name, value in told.items()} | {"versions": versions}


def test_nothing_that_is_rendered_is_left_out_of_the_page(monkeypatch):
    """A template ignores what it does not name."""
    given = []
    real = string.Template.substitute

    def substitute(self, *args, **keys):
        given.append((set(keys), set(self.get_identifiers())))
        return real(self, *args, **keys)

    monkeypatch.setattr(string.Template, "substitute", substitute)
    results, videos = synthetic.make(shown=1)
    report.render(results, videos, 8.0)
    assert len(given) >= 2
    assert all(keys == named for keys, named in given)


def test_says_who_wins_in_the_headline(page):
    text = page.read_text()
    heading = re.search(r"<h1>(.*?)</h1>", text).group(1)
    assert heading == (
        "The ensemble wins on attribute accuracy and Frechet distance (shapes classifier); no clear winner on "
        "held-out flow loss."
    )


def test_the_frechet_distance_is_never_called_fvd(page):
    text = re.sub(r"base64,[^\"]*", "", page.read_text())
    assert text.count("FVD") == text.count("not FVD") > 0
    assert "Frechet distance (shapes classifier)" in text


def test_clips_without_attributes_say_so_and_have_no_ticks():
    results, videos = synthetic.make(shown=1, attributes=False)
    text = report.render(results, videos, 8.0)
    assert "Attribute accuracy is left out: the clips carry no attributes." in text
    assert 'class="ticks"' not in text
    assert "Do the videos show what was asked?" not in text


def test_captions_are_escaped():
    results, videos = synthetic.make(shown=1)
    results["shown"][0]["caption"] = '<script>alert(1)</script> & "quotes"'
    text = report.render(results, videos, 8.0)
    assert "<script>alert(1)" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in text


def test_unequal_compute_is_said_aloud():
    results, videos = synthetic.make(shown=1)
    results["compute"]["equal"], results["compute"]["ratio"] = False, 0.9
    text = report.render(results, videos, 8.0)
    assert "<b>Not equal</b>: the experts spent 0.9000 times" in text
    assert "with different training compute" in text


def test_a_missing_cluster_leaves_its_bar_out():
    results, videos = synthetic.make(shown=1)
    for model in ("ensemble", "monolith", "difference"):
        results["loss_by_cluster"][model][1] = None
    Tags(report.render(results, videos, 8.0))


def test_results_are_plain_json():
    results, _ = synthetic.make(shown=1)
    assert json.loads(json.dumps(results, allow_nan=False)) == results
