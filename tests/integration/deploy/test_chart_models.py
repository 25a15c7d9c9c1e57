"""Where pods find models, what fills the volume that holds them, and memory for them."""

from typing import Any

import pytest
import yaml

from tests.integration.deploy.helm import VALUES, of_kind, render
from tests.integration.deploy.test_chart_wiring import container, pod_template


def test_models_are_mounted_where_they_are_read(helm):
    for values, read_only in (("gpu", True), ("everything", False)):
        for component, deployment in of_kind(render(helm, values), "Deployment").items():
            mounts = {mount["name"]: mount for mount in container(deployment)["volumeMounts"]}
            assert ("models" in mounts) == (component != "scheduler")
            assert mounts.get("models", {}).get("readOnly", read_only) is read_only
            assert set(mounts) == {volume["name"] for volume in pod_template(deployment)["spec"]["volumes"]}


@pytest.mark.parametrize("name", ["gpu", "vllm"])
def test_a_drafter_on_a_gpu_has_room_for_all_its_verifiers_run(name):
    """Of the model that the set of values names: five layers without a window, 8 heads of 128 in bfloat16."""
    values = yaml.safe_load(VALUES[name].read_text())
    sequences = values["verifier"]["replicas"] * values["verifier"]["env"]["DSPARK_MAX_RUNNING"]
    token_bytes = 5 * 2 * 8 * 128 * 2
    held = values["drafter"]["env"]["DSPARK_DRAFT_CACHE_MB"] * 2**20 // token_bytes
    assert held >= sequences * 2048


def test_workers_of_several_gpus_get_shared_memory(helm):
    deployments = of_kind(render(helm, "vllm"), "Deployment")
    volumes = {volume["name"]: volume for volume in pod_template(deployments["verifier"])["spec"]["volumes"]}
    assert volumes["shared-memory"]["emptyDir"] == {"medium": "Memory", "sizeLimit": "8Gi"}
    mounts = {
        mount["name"]: mount["mountPath"] for mount in container(deployments["verifier"])["volumeMounts"]
    }
    assert mounts["shared-memory"] == "/dev/shm"
    assert all("shared-memory" not in str(deployments[one]) for one in ("gateway", "scheduler", "drafter"))
    unset = of_kind(render(helm, "default"), "Deployment")["verifier"]
    assert "shared-memory" not in str(unset)


def test_init_containers_may_write_models_and_keep_their_own_mounts(helm):
    deployment = of_kind(render(helm, "everything"), "Deployment")["verifier"]
    (download,) = pod_template(deployment)["spec"]["initContainers"]
    mounts = {mount["mountPath"]: mount for mount in download["volumeMounts"]}
    assert set(mounts) == {"/models", "/tmp", "/two"}
    assert "readOnly" not in mounts["/models"]


def init_container(helm, *flags: str) -> dict[str, Any]:
    deployment = of_kind(render(helm, "claim", *flags), "Deployment")["verifier"]
    (only,) = pod_template(deployment)["spec"]["initContainers"]
    return only


def test_init_containers_run_in_a_restricted_namespace(helm):
    expected = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert init_container(helm)["securityContext"] == expected


def test_an_init_container_may_have_rights_of_its_own(helm):
    own = "model.initContainers[0].securityContext.runAsUser=7"
    assert init_container(helm, "--set", own)["securityContext"] == {"runAsUser": 7}


@pytest.mark.parametrize("path", ["/tmp", "/models", "/models/"])
def test_what_an_init_container_mounts_itself_is_not_mounted_twice(helm, path):
    first = "model.initContainers[0].volumeMounts[0]"
    own = f"{first}.name=own,{first}.mountPath={path}"
    mounts = init_container(helm, "--set", own)["volumeMounts"]
    paths = [mount["mountPath"].rstrip("/") for mount in mounts]
    assert sorted(paths) == ["/models", "/tmp"]
    assert mounts[0] == {"name": "own", "mountPath": path}


def test_pods_on_several_nodes_can_fill_the_claim_that_the_chart_makes(helm):
    rendered = render(helm, "claim")
    claim = of_kind(rendered, "PersistentVolumeClaim")["models"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    for component in ("gateway", "drafter", "verifier"):
        pod = pod_template(of_kind(rendered, "Deployment")[component])["spec"]
        (volume,) = [one for one in pod["volumes"] if one["name"] == "models"]
        assert volume["persistentVolumeClaim"] == {"claimName": claim["metadata"]["name"]}
        (filling,) = [one for one in pod["initContainers"][0]["volumeMounts"] if one["name"] == "models"]
        assert not filling.get("readOnly")
