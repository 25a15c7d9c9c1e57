"""What the chart's objects say of each other: selectors, ports, addresses, probes, the security context."""

from typing import Any

import pytest
import yaml

from tests.integration.deploy.helm import CHART, VALUES, Manifest, Rendered, of_kind, render, run

SERVICES = ("drafter", "gateway", "scheduler", "verifier")
GRPC_PORTS = {"gateway": 50051, "scheduler": 50052, "verifier": 50053, "drafter": 50054}


@pytest.fixture(scope="module", params=[name for name in VALUES if name != "no_drafter"])
def rendered(helm, request) -> list[Rendered]:
    return render(helm, request.param)


def pod_template(deployment: Manifest) -> Manifest:
    return deployment["spec"]["template"]


def container(deployment: Manifest) -> dict[str, Any]:
    (only,) = pod_template(deployment)["spec"]["containers"]
    return only


def environment(deployment: Manifest, config: Manifest) -> dict[str, Any]:
    own = {
        entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container(deployment)["env"]
    }
    return {**config["data"], **own}


def selected(selector: dict[str, str], rendered: list[Rendered]) -> list[str]:
    """Components whose pods carry all of the selector's labels."""
    return [
        component
        for component, deployment in of_kind(rendered, "Deployment").items()
        if selector.items() <= pod_template(deployment)["metadata"]["labels"].items()
    ]


def test_the_four_services_are_deployed(rendered):
    assert sorted(of_kind(rendered, "Deployment")) == list(SERVICES)
    assert sorted(of_kind(rendered, "Service")) == list(SERVICES)


def test_without_a_drafter_nothing_of_drafters_is_left(helm):
    rendered = render(helm, "no_drafter")
    assert sorted(of_kind(rendered, "Deployment")) == ["gateway", "scheduler", "verifier"]
    assert not [one.source for one in rendered if "drafter" in one.source]
    config = of_kind(rendered, "ConfigMap")["config"]
    verifier = environment(of_kind(rendered, "Deployment")["verifier"], config)
    assert {"DSPARK_DRAFTER", "DSPARK_DRAFTER_ADDRESS"}.isdisjoint(verifier)
    assert verifier["DSPARK_TARGET_MODEL"] == "llama"


def test_selectors_choose_exactly_their_own_pods(rendered):
    for kind in ("Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"):
        for component, manifest in of_kind(rendered, kind).items():
            spec = manifest["spec"]
            selector = spec["podSelector"] if kind == "NetworkPolicy" else spec["selector"]
            assert selected(selector.get("matchLabels", selector), rendered) == [component], kind


def test_services_lead_to_ports_that_the_pods_open(rendered):
    deployments = of_kind(rendered, "Deployment")
    for component, service in of_kind(rendered, "Service").items():
        opened = {port["name"]: port["containerPort"] for port in container(deployments[component])["ports"]}
        assert opened["grpc"] == GRPC_PORTS[component]
        assert all(port["targetPort"] in opened for port in service["spec"]["ports"])


def test_addresses_given_to_services_are_those_of_services(rendered):
    known = {
        f"{service['metadata']['name']}:{port['port']}"
        for service in of_kind(rendered, "Service").values()
        for port in service["spec"]["ports"]
    }
    config = of_kind(rendered, "ConfigMap")["config"]
    verifier = environment(of_kind(rendered, "Deployment")["verifier"], config)
    assert {verifier["DSPARK_SCHEDULER_ADDRESS"], verifier["DSPARK_DRAFTER_ADDRESS"]} <= known


def test_replicas_register_the_address_they_listen_on(rendered):
    config = of_kind(rendered, "ConfigMap")["config"]
    for component in ("drafter", "verifier"):
        deployment = of_kind(rendered, "Deployment")[component]
        names = [entry["name"] for entry in container(deployment)["env"]]
        assert names.index("POD_IP") < names.index("DSPARK_ADVERTISE_ADDRESS"), "$(POD_IP) must be known"
        advertised = environment(deployment, config)["DSPARK_ADVERTISE_ADDRESS"]
        assert advertised == f"$(POD_IP):{GRPC_PORTS[component]}"


def test_settings_of_a_file_of_values_arrive_as_they_stand_there(each_helm, tmp_path):
    """YAML's numbers are floats to helm, which writes large ones as 8.388608e+06."""
    written = {"WHOLE": "8388608", "LARGE": "1000000000000", "SMALL": "0.25", "NEGATIVE": "-1", "NONE": "0"}
    written |= {"FLAG": "true", "TEXT": "'007'"}
    file = tmp_path / "values.yaml"
    lines = [f"    {name}: {value}\n" for name, value in written.items()]
    file.write_text("gateway:\n  env:\n" + "".join(lines))
    done = run(each_helm, "template", "shop", CHART, "-f", file, "-s", "templates/gateway-deployment.yaml")
    found = environment(yaml.safe_load(done.stdout), {"data": {}})
    assert {name: found[name] for name in written} == {**written, "TEXT": "007"}


def test_environment_names_occur_once(rendered):
    for component, deployment in of_kind(rendered, "Deployment").items():
        names = [entry["name"] for entry in container(deployment)["env"]]
        assert len(names) == len(set(names)), component


def health_of(component: str, rendered: list[Rendered]) -> dict[str, Any]:
    """What asks whether a service is ready: its gRPC health, unless it wants a certificate of callers."""
    if component != "gateway" and "DSPARK_TLS_CERT" in of_kind(rendered, "ConfigMap")["config"]["data"]:
        return {"httpGet": {"path": "/readyz", "port": "metrics"}}
    return {"grpc": {"port": GRPC_PORTS[component]}}


def test_readiness_is_the_health_of_every_service(rendered):
    for component, deployment in of_kind(rendered, "Deployment").items():
        assert health_of(component, rendered).items() <= container(deployment)["readinessProbe"].items()


def test_a_gateway_that_waits_for_a_verifier_is_not_restarted(rendered):
    """Its health is not SERVING until a verifier has loaded its model."""
    for component, deployment in of_kind(rendered, "Deployment").items():
        for probe in ("startupProbe", "livenessProbe"):
            asked = container(deployment)[probe]
            if component == "gateway":
                assert asked["httpGet"] == {"path": "/healthz", "port": "http"}
            else:
                assert health_of(component, rendered).items() <= asked.items()


def test_with_a_secret_all_get_its_certificate(helm):
    rendered = render(helm, "tls")
    config = of_kind(rendered, "ConfigMap")["config"]
    for deployment in of_kind(rendered, "Deployment").values():
        (mount,) = [one for one in container(deployment)["volumeMounts"] if one["name"] == "tls"]
        (volume,) = [one for one in pod_template(deployment)["spec"]["volumes"] if one["name"] == "tls"]
        assert volume["secret"]["secretName"] == "dspark-tls"
        for name in ("CERT", "KEY", "CA"):
            file = environment(deployment, config)[f"DSPARK_TLS_{name}"]
            assert file.startswith(f"{mount['mountPath']}/")
        assert environment(deployment, config)["DSPARK_TLS_NAME"] == "dspark.internal"
    assert "DSPARK_TLS_CERT" not in of_kind(render(helm, "default"), "ConfigMap")["config"]["data"]


def test_a_secret_of_keys_is_the_gateways_file(helm):
    rendered = render(helm, "default", "--set", "gateway.keysSecret=clients")
    for component, deployment in of_kind(rendered, "Deployment").items():
        mounts = {mount["name"]: mount for mount in container(deployment)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod_template(deployment)["spec"]["volumes"]}
        assert ("keys" in mounts) == ("keys" in volumes) == (component == "gateway")
        if component == "gateway":
            assert volumes["keys"]["secret"]["secretName"] == "clients"
            file = {one["name"]: one for one in container(deployment)["env"]}["DSPARK_KEYS_FILE"]["value"]
            assert file == f"{mounts['keys']['mountPath']}/keys.toml"


def test_start_up_may_take_as_long_as_loading_a_model_does(rendered):
    for component, deployment in of_kind(rendered, "Deployment").items():
        probe = container(deployment)["startupProbe"]
        startup = probe["periodSeconds"] * probe["failureThreshold"]
        assert startup >= (600 if component in ("drafter", "verifier") else 60)
        assert deployment["spec"]["progressDeadlineSeconds"] > startup


def test_a_gateway_is_given_the_time_that_the_verifier_it_waits_for_is_given(rendered):
    deadlines = {
        component: deployment["spec"]["progressDeadlineSeconds"]
        for component, deployment in of_kind(rendered, "Deployment").items()
    }
    assert deadlines["gateway"] >= deadlines["verifier"]


def test_downloading_a_model_is_given_time(helm):
    def deadline(values: str) -> int:
        deployment = of_kind(render(helm, values), "Deployment")["verifier"]
        return deployment["spec"]["progressDeadlineSeconds"]

    assert deadline("claim") == deadline("default") + 1800


def test_grace_period_outlasts_the_drain(rendered):
    config = of_kind(rendered, "ConfigMap")["config"]
    for deployment in of_kind(rendered, "Deployment").values():
        drain = int(environment(deployment, config)["DSPARK_DRAIN_SECONDS"])
        pause = int(container(deployment)["lifecycle"]["preStop"]["exec"]["command"][1])
        assert pod_template(deployment)["spec"]["terminationGracePeriodSeconds"] >= pause + drain + 15


@pytest.mark.parametrize("seconds", ["600", "0"])
def test_a_service_may_drain_longer_or_shorter_than_the_others(helm, seconds):
    rendered = render(helm, "default", "--set", f"verifier.drainSeconds={seconds}")
    config = of_kind(rendered, "ConfigMap")["config"]
    deployments = of_kind(rendered, "Deployment")
    found = {name: environment(one, config)["DSPARK_DRAIN_SECONDS"] for name, one in deployments.items()}
    assert found == dict.fromkeys(SERVICES, "20") | {"verifier": seconds}
    grace = pod_template(deployments["verifier"])["spec"]["terminationGracePeriodSeconds"]
    assert grace == 5 + int(seconds) + 20


def test_every_pod_runs_with_the_least_rights(rendered):
    pods = [pod_template(deployment)["spec"] for deployment in of_kind(rendered, "Deployment").values()]
    pods.append(of_kind(rendered, "Pod")["test"]["spec"])
    for pod in pods:
        (only,) = pod["containers"]
        elects = {"name": "DSPARK_LEADER_ELECTION", "value": "lease"} in only.get("env", [])
        assert pod["automountServiceAccountToken"] is elects
        assert pod["enableServiceLinks"] is False, "DSPARK_PORT of a Service called dspark would be read"
        security = pod["securityContext"]
        assert security["runAsNonRoot"] is True
        assert security["runAsUser"] == 10001
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}
        (only,) = pod["containers"]
        assert only["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert only["resources"]["limits"]["memory"]
        assert only["resources"]["requests"]


def test_the_cluster_may_choose_user_and_group(helm):
    """As OpenShift's restricted-v2 wants it."""
    flags = ",".join(f"podSecurityContext.{key}=null" for key in ("runAsUser", "runAsGroup", "fsGroup"))
    rendered = render(helm, "default", "--set", flags)
    pods = [pod_template(deployment)["spec"] for deployment in of_kind(rendered, "Deployment").values()]
    for pod in [*pods, of_kind(rendered, "Pod")["test"]["spec"]]:
        assert pod["securityContext"] == {
            "runAsNonRoot": True,
            "fsGroupChangePolicy": "OnRootMismatch",
            "seccompProfile": {"type": "RuntimeDefault"},
        }


def test_an_autoscaler_alone_decides_the_number_of_replicas(rendered):
    scaled = of_kind(rendered, "HorizontalPodAutoscaler")
    for component, deployment in of_kind(rendered, "Deployment").items():
        assert ("replicas" in deployment["spec"]) == (component not in scaled)
        if component in scaled:
            target = scaled[component]["spec"]["scaleTargetRef"]
            assert (target["kind"], target["name"]) == ("Deployment", deployment["metadata"]["name"])


def test_network_policies_admit_the_callers_and_nobody_else(helm):
    policies = of_kind(render(helm, "production"), "NetworkPolicy")
    rendered = render(helm, "production")
    callers = {
        "scheduler": {"gateway", "drafter", "verifier"},
        "drafter": {"verifier"},
        "verifier": {"gateway"},
    }
    for component, expected in callers.items():
        grpc, metrics = policies[component]["spec"]["ingress"]
        assert [port["port"] for port in grpc["ports"]] == ["grpc"]
        admitted = {
            name for peer in grpc["from"] for name in selected(peer["podSelector"]["matchLabels"], rendered)
        }
        assert admitted == expected
        assert [port["port"] for port in metrics["ports"]] == ["metrics"]
        assert metrics["from"][0]["namespaceSelector"]
    assert all(rule.get("from") for rule in policies["gateway"]["spec"]["ingress"])
    smoke = of_kind(rendered, "Pod")["test"]["metadata"]["labels"].items()
    peers = [peer for rule in policies["gateway"]["spec"]["ingress"] for peer in rule["from"]]
    assert any(peer["podSelector"]["matchLabels"].items() <= smoke for peer in peers if "podSelector" in peer)


def routes(rendered: list[Rendered]) -> dict[str, list[tuple[str, str]]]:
    rules = of_kind(rendered, "Ingress")["gateway"]["spec"]["rules"]
    return {
        rule["host"]: [(path["pathType"], path["path"]) for path in rule["http"]["paths"]] for rule in rules
    }


def test_the_public_reaches_the_api_alone_unless_the_page_is_wanted(helm):
    assert routes(render(helm, "production")) == {"llm.example.org": [("Prefix", "/v1")]}
    page = [("Exact", "/"), ("Exact", "/readyz")]
    assert routes(render(helm, "everything")) == {
        "a.example.org": [("Prefix", "/v1"), *page],
        "b.example.org": [("Prefix", "/llm"), *page],
    }


@pytest.mark.parametrize(
    "allowed", ["envFrom[0].secretRef.name=keys", "env.DSPARK_API_KEYS=k", "ingress.allowWithoutKeys=true"]
)
def test_an_ingress_needs_keys_or_consent(helm, allowed):
    flags = f"gateway.ingress.enabled=true,gateway.ingress.hosts[0].host=a,gateway.{allowed}"
    assert routes(render(helm, "default", "--set", flags)) == {"a": [("Prefix", "/v1")]}


def test_monitors_select_services_and_ports_that_exist(helm):
    rendered = render(helm, "production")
    spec = of_kind(rendered, "ServiceMonitor")["metrics"]["spec"]
    wanted = {endpoint["port"] for endpoint in spec["endpoints"]}
    for component, service in of_kind(rendered, "Service").items():
        assert spec["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
        scraped = wanted & {port["name"] for port in service["spec"]["ports"]}
        assert len(scraped) == 1, component


def test_a_changed_setting_replaces_the_pods(helm):
    def checksums(*flags: str) -> set[str]:
        deployments = of_kind(render(helm, "default", *flags), "Deployment").values()
        return {pod_template(d)["metadata"]["annotations"]["checksum/config"] for d in deployments}

    assert len(checksums()) == 1
    assert checksums() == checksums("--set", "gateway.replicas=5")
    assert checksums().isdisjoint(checksums("--set", "logLevel=DEBUG"))


def test_threads_follow_the_cpu_limit_unless_set_otherwise(helm):
    def threads(values: str, component: str) -> object:
        rendered = render(helm, values)
        config = of_kind(rendered, "ConfigMap")["config"]
        return environment(of_kind(rendered, "Deployment")[component], config).get("DSPARK_TORCH_THREADS")

    assert threads("default", "verifier") == {"resourceFieldRef": {"resource": "limits.cpu"}}
    assert threads("everything", "verifier") == "3"
    assert threads("minimal", "drafter") is None
    assert threads("default", "gateway") is None


COMPILED = {"TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"}


def test_what_is_compiled_lies_in_a_writable_folder_of_the_engines(rendered):
    config = of_kind(rendered, "ConfigMap")["config"]
    for component, deployment in of_kind(rendered, "Deployment").items():
        folders = {mount["mountPath"]: mount for mount in container(deployment)["volumeMounts"]}
        found = environment(deployment, config)
        if component not in ("drafter", "verifier"):
            assert not COMPILED & set(found)
            assert "/var/cache/dspark" not in folders
            continue
        volumes = {volume["name"]: volume for volume in pod_template(deployment)["spec"]["volumes"]}
        mount = folders["/var/cache/dspark"]
        assert not mount.get("readOnly")
        assert set(volumes[mount["name"]]["emptyDir"]) == {"sizeLimit"}  # on disk: not of the memory limit
        assert all(found[name].startswith("/var/cache/dspark/") for name in COMPILED)


def test_where_compiled_kernels_lie_may_be_set_otherwise(helm):
    rendered = render(helm, "default", "--set", "verifier.env.TRITON_CACHE_DIR=/elsewhere")
    config = of_kind(rendered, "ConfigMap")["config"]
    found = environment(of_kind(rendered, "Deployment")["verifier"], config)
    assert found["TRITON_CACHE_DIR"] == "/elsewhere"
    assert found["TORCHINDUCTOR_CACHE_DIR"] == "/var/cache/dspark/inductor"


def test_redis_comes_from_a_secret_or_a_plain_url_or_not_at_all(helm):
    def redis(values: str) -> object:
        rendered = render(helm, values)
        config = of_kind(rendered, "ConfigMap")["config"]
        return environment(of_kind(rendered, "Deployment")["scheduler"], config).get("REDIS_URL")

    assert redis("production") == {"secretKeyRef": {"name": "dspark-redis", "key": "redis-url"}}
    assert redis("everything") == "rediss://redis.example.org:6380/1"
    assert redis("default") is None


def test_keys_in_redis_have_the_prefix_of_the_release(helm):
    def prefix(*flags: str) -> object:
        rendered = render(helm, "everything", *flags)
        config = of_kind(rendered, "ConfigMap")["config"]
        return environment(of_kind(rendered, "Deployment")["scheduler"], config)["DSPARK_REDIS_PREFIX"]

    assert prefix() == "dspark"
    assert prefix("--set", "redis.prefix=shop") == "shop"


@pytest.mark.parametrize(
    ("values", "flags", "election"),
    [
        ("default", [], "off"),
        ("production", [], "redis"),
        ("lease", [], "lease"),
        ("own_account", [], "lease"),
        ("default", ["--set", "scheduler.leaderElection=lease"], "lease"),
    ],
)
def test_how_schedulers_agree_on_a_leader(helm, values, flags, election):
    rendered = render(helm, values, *flags)
    config = of_kind(rendered, "ConfigMap")["config"]
    assert (
        environment(of_kind(rendered, "Deployment")["scheduler"], config)["DSPARK_LEADER_ELECTION"]
        == election
    )
    assert ("scheduler" in of_kind(rendered, "Role")) == (election == "lease")
    assert ("scheduler" in of_kind(rendered, "Lease")) == (election == "lease")


@pytest.mark.parametrize("values", ["lease", "own_account"])
def test_the_scheduler_alone_has_rights_and_to_its_lease_alone(helm, values):
    rendered = render(helm, values)
    config = of_kind(rendered, "ConfigMap")["config"]
    deployments = of_kind(rendered, "Deployment")
    variables = environment(deployments["scheduler"], config)
    role, binding = (of_kind(rendered, kind)["scheduler"] for kind in ("Role", "RoleBinding"))
    granted = {
        (verb, tuple(rule.get("resourceNames", ()))) for rule in role["rules"] for verb in rule["verbs"]
    }
    name = variables["DSPARK_LEADER_LEASE_NAME"]
    lease = of_kind(rendered, "Lease")["scheduler"]  # of the release, so that it ends with it
    assert lease["metadata"]["name"] == name
    assert "spec" not in lease  # an upgrade must not touch what the schedulers write
    assert granted == {("get", (name,)), ("update", (name,)), ("create", ())}
    for rule in role["rules"]:
        assert (rule["apiGroups"], rule["resources"]) == (["coordination.k8s.io"], ["leases"])
    assert binding["roleRef"]["name"] == role["metadata"]["name"]
    (subject,) = binding["subjects"]
    assert subject["namespace"] == variables["DSPARK_LEADER_LEASE_NAMESPACE"] == "llm"
    accounts = {
        component: pod_template(deployment)["spec"]["serviceAccountName"]
        for component, deployment in deployments.items()
    }
    assert accounts["scheduler"] == subject["name"]
    made = of_kind(rendered, "ServiceAccount")
    if values == "own_account":
        assert made == {}
        assert subject["name"] == "existing"
    else:
        assert made["scheduler"]["metadata"]["name"] == subject["name"]
        assert subject["name"] not in {accounts[other] for other in ("gateway", "drafter", "verifier")}


def test_image_references(helm):
    def images(values: str) -> dict[str, str]:
        deployments = of_kind(render(helm, values), "Deployment")
        return {component: container(deployment)["image"] for component, deployment in deployments.items()}

    assert images("default")["verifier"] == "dspark-verifier:0.1.0"
    assert images("gpu")["drafter"] == "registry.example.org/acme/dspark-drafter:0.1.0"
    assert images("everything")["verifier"] == "127.0.0.1:5000/dspark-verifier:v9"
    assert images("everything")["gateway"].startswith("example.org/gateway@sha256:")


def test_chart_values_are_complete_against_the_schema(helm):
    """A key in values.yaml that the schema does not know could never be set."""
    schema = yaml.safe_load((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert set(values) == set(schema["properties"]) - {"global"}
    for service in SERVICES:
        assert set(values[service]) == set(schema["properties"][service]["properties"])


def test_pods_that_do_not_serve_keep_no_node_from_being_drained(rendered):
    for budget in of_kind(rendered, "PodDisruptionBudget").values():
        assert budget["spec"]["unhealthyPodEvictionPolicy"] == "AlwaysAllow"


@pytest.mark.parametrize(("values", "plain"), [("default", set(SERVICES)), ("tls", {"gateway"})])
def test_only_what_is_unencrypted_says_so(helm, values, plain):
    services = of_kind(render(helm, values), "Service")
    named = {
        component
        for component, service in services.items()
        if any(port.get("appProtocol") == "kubernetes.io/h2c" for port in service["spec"]["ports"])
    }
    assert named == plain
