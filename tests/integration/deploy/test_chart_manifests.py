"""Everything the chart renders is linted, and valid for the oldest and the newest Kubernetes it supports."""

import json
from collections import Counter
from functools import cache

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tests.integration.deploy.helm import CHART, HERE, VALUES, Rendered, of_kind, render, run

KUBERNETES = ("1.27", "1.37")
FROM_CRDS = {
    kind: json.loads((HERE / f"schemas/{kind}.json").read_text())
    for kind in ("ServiceMonitor", "PrometheusRule")
}


def validate(item: Rendered, version: str) -> None:
    _validate(json.dumps(item.manifest), version)


@cache
def _validate(text: str, version: str) -> None:
    """Once for objects that several helms and values render alike."""
    manifest = json.loads(text)
    if manifest["kind"] in FROM_CRDS:
        jsonschema.validate(manifest, FROM_CRDS[manifest["kind"]])
        return
    # An unknown kind is an exception here, not a warning.
    kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("values", VALUES)
def test_values_pass_lint_and_render_valid_objects(each_helm, values):
    path = VALUES[values]
    lint = run(each_helm, "lint", "--strict", CHART, *(["-f", path] if path else []))
    assert lint.returncode == 0, lint.stdout + lint.stderr
    for item in render(each_helm, values):
        for version in KUBERNETES:
            validate(item, version)


def test_validation_sees_a_misspelt_field(helm):
    (item,) = [i for i in render(helm) if i.source == "templates/verifier-deployment.yaml"]
    item.manifest["spec"]["template"]["spec"]["containers"][0]["reedinessProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="reedinessProbe"):
        validate(item, KUBERNETES[-1])


def test_an_unknown_kind_is_an_error(helm):
    item = render(helm)[0]
    item.manifest["kind"] = "Deploiment"
    with pytest.raises(kubernetes_validate.SchemaNotFoundError):
        validate(item, KUBERNETES[-1])


@pytest.mark.parametrize("values", VALUES)
def test_each_template_holds_one_object_and_names_are_unique(helm, values):
    rendered = render(helm, values)
    assert max(Counter(item.source for item in rendered).values()) == 1
    names = Counter((item.manifest["kind"], item.manifest["metadata"]["name"]) for item in rendered)
    assert max(names.values()) == 1


@pytest.mark.parametrize("values", VALUES)
def test_containers_mount_only_volumes_that_their_pod_has(helm, values):
    """The API server refuses others; a schema cannot tell."""
    for name, deployment in of_kind(render(helm, values), "Deployment").items():
        pod = deployment["spec"]["template"]["spec"]
        volumes = {volume["name"] for volume in pod["volumes"]}
        for one in pod["containers"] + pod.get("initContainers", []):
            paths = [mount["mountPath"] for mount in one["volumeMounts"]]
            assert len(paths) == len(set(paths)), (name, one["name"], paths)
            assert {mount["name"] for mount in one["volumeMounts"]} <= volumes, (name, one["name"])


def test_every_template_is_rendered_by_some_values(helm):
    """A template no test renders could hold anything."""
    seen = {item.source for values in VALUES for item in render(helm, values)}
    templates = {str(path.relative_to(CHART)) for path in CHART.rglob("templates/**/*.yaml")}
    assert templates == seen


def test_the_packaged_chart_renders_the_same(each_helm, tmp_path):
    done = run(each_helm, "package", CHART, "--destination", tmp_path)
    assert done.returncode == 0, done.stderr
    version = yaml.safe_load((CHART / "Chart.yaml").read_text())["version"]
    packaged = run(each_helm, "template", "shop", tmp_path / f"dspark-{version}.tgz", "--namespace", "llm")
    folder = run(each_helm, "template", "shop", CHART, "--namespace", "llm")
    assert packaged.stdout == folder.stdout != ""


def test_two_releases_in_one_namespace_have_no_object_in_common(helm):
    def names(release: str) -> set[tuple[str, str]]:
        done = run(helm, "template", release, CHART, "--namespace", "llm", "-f", VALUES["production"])
        assert done.returncode == 0, done.stderr
        rendered = filter(None, yaml.safe_load_all(done.stdout))
        return {(one["kind"], one["metadata"]["name"]) for one in rendered}

    assert not names("dspark") & names("dspark-tls")
