"""Alerts and dashboard ask for metrics and labels that exist, fire when they should, come with the chart."""

import json
import re
import shutil
import subprocess

import pytest
import yaml
from grpc import StatusCode
from prometheus_client import CollectorRegistry

from dspark_core.records import RoundReport
from services.gateway.generation import ORDINARY_OUTCOMES
from services.verifier.metrics import VerifierMetrics
from tests.integration.deploy.exposed_metrics import exposed_series
from tests.integration.deploy.helm import CHART, HERE, Rendered, of_kind, render

ALERTS, DASHBOARD = CHART / "files/alerts.yaml", CHART / "files/dashboard.json"
SCRAPE_LABELS = {"namespace", "pod"}  # the Prometheus operator adds them
SERIES = exposed_series()


def rules() -> list[dict]:
    return [rule for group in yaml.safe_load(ALERTS.read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict]:
    return json.loads(DASHBOARD.read_text())["panels"]


def expressions() -> dict[str, str]:
    asked = {rule["alert"]: rule["expr"] for rule in rules()}
    for panel in panels():
        for target in panel.get("targets", ()):
            asked[f"{panel['title']} {target['refId']}"] = target["expr"]
    return asked


EXPRESSIONS = expressions()


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_expressions_ask_for_metrics_and_labels_that_exist(name):
    expression = EXPRESSIONS[name]
    asked = set(re.findall(r"dspark_[a-z_]+", expression))
    assert asked, expression
    assert asked - set(SERIES) == set()
    known = set.union(*(SERIES[metric] for metric in asked)) | SCRAPE_LABELS
    grouped = {
        label.strip() for labels in re.findall(r"by \(([^)]*)\)", expression) for label in labels.split(",")
    }
    assert grouped - known == set()
    for metric, selector in re.findall(r"(dspark_[a-z_]+)\{([^}]*)\}", expression):
        selected = set(re.findall(r"([a-z_]+)\s*(?:=~|!~|!=|=)", selector))
        assert selected - SERIES[metric] - SCRAPE_LABELS == set(), (metric, selector)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_rates_are_taken_of_counters(name):
    """A gauge that only grows is one to nobody who reads its type."""
    asked = re.findall(r"(?:rate|increase)\((\w+)", EXPRESSIONS[name])
    assert [metric for metric in asked if not metric.endswith(("_total", "_bucket", "_sum", "_count"))] == []


def test_what_a_label_is_compared_with_is_what_services_write():
    """A selector on a value nobody writes never matches, and nothing else would tell."""
    text = "\n".join(EXPRESSIONS.values())
    written = {"yes", "no", "completion", "verifier", "drafter", "429", "5..", "/v1/.*", "$namespace"}
    assert set(re.findall(r'(?:=~|!=|=)"([^"]*)"', text)) <= written
    excluded = {value for told in re.findall(r'!~"([^"]*)"', text) for value in told.split("|")}
    assert excluded <= {code.name for code in StatusCode} | ORDINARY_OUTCOMES


@pytest.mark.parametrize("name", ["DSparkAnswersFail", "Failed answers A"])
def test_answers_have_failed_unless_their_outcome_is_ordinary(name):
    """By exclusion, because an unexpected error counts under its own name."""
    excluded = re.findall(r'outcome!~"([^"]*)"', EXPRESSIONS[name])
    assert set("|".join(excluded).split("|")) == ORDINARY_OUTCOMES


def test_a_misspelt_metric_would_be_found():
    assert "dspark_gateway_time_to_first_token_seconds_bucket" in SERIES
    assert "dspark_gateway_time_to_first_token_seconds_total" not in SERIES
    assert SERIES["dspark_gateway_speed_floors_total"] == {"tier", "held"}


def test_every_alert_says_how_bad_it_is_and_what_to_do():
    names = [rule["alert"] for rule in rules()]
    assert len(set(names)) == len(names)
    for rule in rules():
        assert rule["labels"]["severity"] in {"critical", "warning", "info"}
        assert rule["annotations"].keys() == {"summary", "description"}


def quantile(share: float, waits: list[float]) -> float:
    """As Prometheus has it of the buckets that a verifier exposes: linear between the edges of one."""
    registry = CollectorRegistry()
    metrics = VerifierMetrics(registry)
    for number, seconds in enumerate(waits):
        metrics.observe_round(RoundReport(replica_id="v", round=number, draft_seconds=seconds))
    (family,) = [one for one in registry.collect() if one.name == "dspark_draft_wait_seconds"]
    counts = [(float(one.labels["le"]), one.value) for one in family.samples if one.name.endswith("_bucket")]
    edge, below = 0.0, 0.0
    for top, count in counts:
        if count >= share * len(waits):
            return edge + (top - edge) * (share * len(waits) - below) / (count - below)
        edge, below = top, count
    raise AssertionError(counts)


@pytest.mark.parametrize(
    ("shortest", "longest", "late"),
    [(0.15, 0.25, False), (0.21, 0.25, False), (0.30, 0.38, False), (0.41, 0.45, True), (0.5, 0.502, True)],
)
def test_drafts_are_late_where_waits_come_near_the_deadline(shortest, longest, late):
    waits = [shortest + (longest - shortest) * index / 1000 for index in range(1001)]
    share, limit = re.fullmatch(
        r"histogram_quantile\(([\d.]+), .*dspark_draft_wait_seconds_bucket.*\) > ([\d.]+)",
        EXPRESSIONS["DSparkDraftsLate"],
    ).groups()
    assert (quantile(float(share), waits) > float(limit)) is late


@pytest.fixture(scope="session")
def promtool() -> str:
    found = shutil.which("promtool")
    if found is None:
        pytest.skip("no promtool: install Debian's prometheus")
    return found


@pytest.mark.parametrize("check", [("check", "rules", ALERTS), ("test", "rules", HERE / "alerts_test.yaml")])
def test_promtool_accepts_the_alerts_and_they_fire(promtool, check):
    done = subprocess.run([promtool, *check], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_panels_have_titles_questions_and_places_of_their_own():
    ids = [panel["id"] for panel in panels()]
    assert len(set(ids)) == len(ids)
    taken = set()
    for panel in panels():
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not taken & cells, panel["title"]
        taken |= cells
        if panel["type"] != "row":
            assert panel["description"]
            assert panel["targets"]


def shipped_rules(rendered: list[Rendered]) -> list[dict]:
    (rule,) = [item.manifest for item in rendered if item.manifest["kind"] == "PrometheusRule"]
    return [rule for group in rule["spec"]["groups"] for rule in group["rules"]]


WITH_RULES = ("--set", "metrics.prometheusRule.enabled=true")


def test_a_missing_drafter_is_told_of_the_installations_own_namespace(each_helm):
    (rule,) = [
        one
        for one in shipped_rules(render(each_helm, "default", *WITH_RULES))
        if one["alert"] == "DSparkNoDrafter"
    ]
    (written,) = [one for one in rules() if one["alert"] == "DSparkNoDrafter"]
    assert rule == {**written, "expr": written["expr"].replace("{role=", '{namespace="llm",role=')}


@pytest.mark.parametrize(
    ("values", "flags"), [("no_drafter", ()), ("default", ("--set", "drafter.replicas=0"))]
)
def test_where_no_drafter_is_configured_none_is_missed(helm, values, flags):
    asked = [rule["alert"] for rule in shipped_rules(render(helm, values, *flags, *WITH_RULES))]
    assert "DSparkNoVerifier" in asked
    assert "DSparkNoDrafter" not in asked


@pytest.mark.parametrize("values", ["production", "everything"])
def test_the_chart_ships_both(helm, values):
    rendered = render(helm, values)
    asked = shipped_rules(rendered)
    others = [rule for rule in rules() if rule["alert"] != "DSparkNoDrafter"]
    assert [rule for rule in asked if rule["alert"] != "DSparkNoDrafter"] == others
    dashboard = of_kind(rendered, "ConfigMap")["metrics"]
    assert json.loads(dashboard["data"]["dspark.json"]) == json.loads(DASHBOARD.read_text())


def test_the_chart_ships_neither_unasked(helm):
    rendered = render(helm)
    assert "PrometheusRule" not in {item.manifest["kind"] for item in rendered}
    assert "metrics" not in of_kind(rendered, "ConfigMap")
