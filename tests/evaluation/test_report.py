"""The report is one file that a real browser opens: all videos decode, nothing errs, nothing is fetched."""

import html.parser
import json
import re
import string
from pathlib import Path

import pytest

from paris_jax.evaluation import headline_figure, report
from paris_jax.evaluation.results import format_estimate
from tests.evaluation import synthetic
from tests.evaluation.browser import browse, needs_browser, run_scripts


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
def test_the_report_makes_no_network_request(page):
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


# Texts of one plot, or cells of one table, that are drawn over each other by more than a pixel.
OVERPRINTED = """() => {
  const found = [];
  for (const parent of document.querySelectorAll("svg.plot, table, .number, .tile, .card")) {
    const texts = [...parent.querySelectorAll("text, td, th, dt, dd, h2, h3, li, .pill")];
    const printed = (e) => {  // its box, and what of its text reaches beyond it
      const range = document.createRange();
      range.selectNodeContents(e);
      const a = e.getBoundingClientRect(), b = e.tagName === "text" ? a : range.getBoundingClientRect();
      return { left: Math.min(a.left, b.left), right: Math.max(a.right, b.right), top: a.top, bottom: a.bottom };
    };
    const boxes = texts.map((e) => [e, printed(e)]);
    for (const [i, [a, r]] of boxes.entries()) for (const [b, q] of boxes.slice(i + 1)) {
      if (a.contains(b) || b.contains(a)) continue;
      const w = Math.min(r.right, q.right) - Math.max(r.left, q.left);
      const h = Math.min(r.bottom, q.bottom) - Math.max(r.top, q.top);
      if (w > 1 && h > 1) found.push(`${a.textContent} / ${b.textContent}`);
    }
  }
  return found;
}"""


@needs_browser
@pytest.mark.parametrize("width", [390, 760, 1280])
def test_no_text_overlaps_and_the_page_fits_the_screen(page, width):
    over, wide = run_scripts(page, width, 800, OVERPRINTED, "() => document.documentElement.scrollWidth")
    assert over == []
    assert wide <= width


@needs_browser
def test_overprinting_would_be_noticed(page, tmp_path):
    moved = tmp_path / "moved.html"
    moved.write_text(page.read_text().replace("</style>", ".plot .tick { font-size: 60px; }</style>", 1))
    assert run_scripts(moved, 390, 800, OVERPRINTED)[0]


@needs_browser
def test_the_first_screen_is_verdict_number_and_videos(page):
    shown = "['h1', 'section.number', 'video', '#pause']"
    bottoms = f"() => {shown}.map((s) => document.querySelector(s).getBoundingClientRect().bottom)"
    assert max(run_scripts(page, 1280, 800, bottoms)[0]) <= 800


@needs_browser
def test_the_keyboard_reaches_every_control_and_wide_table(page):
    focus = """async () => {
      const names = [];
      for (const e of document.querySelectorAll("a, button, [tabindex]")) {
        e.focus();
        names.push(document.activeElement === e);
      }
      return names;
    }"""
    reached = run_scripts(page, 1280, 800, focus)[0]
    assert len(reached) >= 3 + page.read_text().count('tabindex="0"') and all(reached)


@needs_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_have_the_contrast_of_wcag_aa(page, scheme):
    """4.5 to 1 for every colour of text, on the page and on cards."""
    ratios = run_scripts(page, 1280, 800, CONTRAST, scheme=scheme)[0]
    assert min(ratios.values()) >= 4.5, ratios


CONTRAST = """() => {
  const style = getComputedStyle(document.documentElement), light = (name) => {
    const hex = style.getPropertyValue(name).trim().slice(1);
    const part = [0, 2, 4].map((i) => parseInt(hex.slice(i, i + 2), 16) / 255)
      .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
    return 0.2126 * part[0] + 0.7152 * part[1] + 0.0722 * part[2];
  };
  const found = {};
  for (const text of ["--ink", "--soft", "--faint", "--ensemble", "--monolith", "--real", "--good", "--bad"])
    for (const ground of ["--page", "--card"]) {
      const [a, b] = [light(text), light(ground)].sort((x, y) => y - x);
      found[`${text} on ${ground}`] = (a + 0.05) / (b + 0.05);
    }
  return found;
}"""


def test_every_plot_has_a_name_for_screen_readers(page):
    plots = [a for tag, a in Tags(page.read_text()).seen if tag == "svg"]
    assert plots and all(a.get("role") == "img" and a.get("aria-label") for a in plots)
    (bars,) = (a["aria-label"] for a in plots if a["aria-label"].startswith("Flow loss by cluster"))
    assert bars.endswith("(cluster 0, cluster 1, cluster 2): ensemble 0.5, 0.71, 0.62; monolith 0.52, 0.7, 0.66")


def test_the_report_lists_what_cannot_be_concluded(page):
    text = page.read_text()
    listed = text[text.index("What cannot be concluded") : text.index("How to read the scores")]
    assert "Which model has the better held-out flow loss: the 95 % interval" in listed
    assert "another seed of training" in listed and "1 are of one colour" in listed
    assert "29% of the lower distance is that of real clips" in listed  # 0.9 of 3.1


def test_the_first_screen_shows_raw_values_beside_the_ratio_over_the_floor(page):
    text = page.read_text()
    number = re.search(r'<section class="number".*?</section>', text, re.DOTALL).group()
    assert "3.10 ± 0.22" in number and "4.40 ± 0.30" in number
    assert "the monolith is 1.59 times as far as the ensemble" in number  # (4.4 - 0.9) / (3.1 - 0.9)


def test_a_withheld_verdict_is_not_called_unclear():
    results, videos = synthetic.make(shown=1)
    results["comparisons"][1] |= {"winner": "none", "withheld": "4 clips are too few for a verdict, which needs 8"}
    text = report.render(results, videos, 8.0)
    assert "verdict withheld" in text and "4 clips are too few for a verdict" in text


def test_the_headline_is_a_figure_to_share():
    pytest.importorskip("matplotlib", reason="draws the figure; pip install -e '.[evaluation]'")
    made = headline_figure.render(synthetic.make(shown=1)[0])
    assert made["headline.png"].startswith(b"\x89PNG") and made["headline.pdf"].startswith(b"%PDF")
    assert headline_figure.render(synthetic.make(shown=1)[0]) == made  # nothing of the time of day is in it


def test_scripts_styles_and_videos_are_inlined(page):
    text = page.read_text()
    for tag, attributes in Tags(text).seen:
        for name in ("src", "href"):
            assert attributes.get(name, "data:").startswith(("data:", "#")), tag
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
    "Each expert on each cluster": ("td", 1 + 3 * 3),  # its corner, and a loss each
    "Disagreement by time": ("circle", 8),
    "Router’s confusion": ("td", 1 + 3 * 3),
    "Attribute accuracy by setting": ("rect", 3),
    "Frechet distance (shapes classifier) by setting": ("rect", 3),
}


@pytest.mark.parametrize("title", PANELS)
def test_every_plot_draws_the_measured_values(title, page):
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
    expected = results["protocol"]
    versions = ", ".join(f"{name} {version}" for name, version in expected["versions"].items())
    assert protocol == {name: str(value) for name, value in expected.items()} | {"versions": versions}


def test_every_rendered_section_is_in_the_page(monkeypatch):
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
    assert "<h2>Attribute accuracy</h2>" not in text


def test_captions_are_escaped():
    results, videos = synthetic.make(shown=1)
    results["shown"][0]["caption"] = '<script>alert(1)</script> & "quotes"'
    text = report.render(results, videos, 8.0)
    assert "<script>alert(1)" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &amp;" in text


def test_unequal_compute_is_reported():
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
