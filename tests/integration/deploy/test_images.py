"""The Dockerfile and the compose file: linted by their own tools, and what they promise."""

import fnmatch
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from dspark_core.model_paths import DEFAULT_MODEL
from dspark_core.zoo_paths import DEFAULT_DRAFTER
from tests.integration.deploy.helm import ROOT

DOCKERFILE = ROOT / "deploy/docker/Dockerfile"
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
ON_GPUS = yaml.safe_load((ROOT / "docker-compose.gpu.yml").read_text())
OWN = ("gateway", "scheduler", "drafter", "verifier")


def tool(name: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [Path(sys.executable).with_name(name), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)


def stages() -> dict[str, list[str]]:
    """Instructions of each stage by its name, continuation lines joined."""
    text = re.sub(r"\\\n\s*", " ", DOCKERFILE.read_text())
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if line.startswith("FROM "):
            found[line.split(" AS ")[1]] = [line]
        elif line and not line.startswith("#"):
            found[list(found)[-1]].append(line)
    return found


def lineage(stage: str) -> list[str]:
    """A stage and those it is built from."""
    parent = stages()[stage][0].split()[1]
    return [stage, *lineage(parent)] if parent in stages() else [stage]


def test_hadolint_finds_nothing():
    done = tool("hadolint", DOCKERFILE)
    assert (done.returncode, done.stdout) == (0, "")


def test_compose_lint_finds_only_images_without_a_digest():
    done = tool("compose-lint", "--format", "json", "docker-compose.yml")
    rules = set(re.findall(r"CL-\d{4}", done.stdout))
    assert rules <= {"CL-0019"}, done.stdout  # images built here have no digest before they are built
    assert done.returncode == 0


@pytest.mark.parametrize(
    "files", [(), ("-f", "docker-compose.yml", "-f", "docker-compose.gpu.yml")], ids=["cpu", "gpu"]
)
def test_docker_compose_accepts_the_file(files):
    if not shutil.which("docker") or tool_missing("docker", "compose", "version"):
        pytest.skip("no docker compose on this machine")
    done = subprocess.run(
        ["docker", "compose", *files, "config", "-q"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")


def tool_missing(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode != 0


@pytest.mark.parametrize("service", OWN)
def test_each_service_has_an_image_that_runs_it_without_rights(service):
    built = stages()[service]
    inherited = [line for stage in lineage(service) for line in stages()[stage]]
    assert f'CMD ["python", "-m", "services.{service}.main"]' in built
    assert "USER 10001:10001" in inherited


@pytest.mark.parametrize("service", ["gateway", "scheduler"])
def test_images_without_an_engine_never_see_torch(service):
    copied = [line for line in stages()[service] if line.startswith("COPY --from=")]
    (source,) = [re.match(r"COPY --from=(\S+)", line).group(1) for line in copied]
    assert "torch" not in " ".join(line for stage in lineage(source) for line in stages()[stage])


def test_base_requirements_are_free_of_torch_and_the_engine_has_it(tmp_path):
    def requirements(*extra: str) -> str:
        script = ROOT / "deploy/docker/requirements.py"
        return subprocess.run(
            [sys.executable, script, *extra], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout

    assert "torch" not in requirements()
    assert "grpcio" in requirements()
    assert "torch" in requirements("engine")
    assert "kubernetes" not in requirements()
    assert "kubernetes" in requirements("kubernetes")


def test_the_scheduler_s_image_can_elect_by_a_lease():
    built = " ".join(line for stage in lineage("scheduler-build") for line in stages()[stage])
    assert "requirements.py kubernetes" in built


def test_the_build_needs_no_frontend_from_a_registry():
    assert not re.search(r"^#\s*syntax=", DOCKERFILE.read_text(), flags=re.MULTILINE)


def test_everything_the_build_copies_is_let_through_by_dockerignore():
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    assert rules[1] == "*", "an allow-list"
    allowed = [rule.removeprefix("!") for rule in rules if rule.startswith("!")]
    named = re.findall(r"^COPY (?!--from)(.+) \./$", DOCKERFILE.read_text(), flags=re.MULTILINE)
    assert set(" ".join(named).split()) <= set(allowed)
    assert all((ROOT / path).exists() for path in allowed)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    read = {"pyproject.toml", project["readme"], *project["license-files"]}
    assert read | {"NOTICE", "dspark_core", "services", "proto/gen"} <= set(allowed)


def dockerignored(path: str) -> bool:
    """As Docker decides: the last rule that names the path, or a folder above it, holds."""
    above = [path, *(str(parent) for parent in Path(path).parents)]
    ignored = False
    for rule in (ROOT / ".dockerignore").read_text().splitlines():
        if rule and not rule.startswith("#") and fnmatch.filter(above, rule.removeprefix("!")):
            ignored = not rule.startswith("!")
    return ignored


def test_wheels_and_images_hold_the_default_drafter_and_table_but_no_baselines():
    package = ROOT / "dspark_core"
    data = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {path.parent.name for rule in data["dspark_core"] for path in package.glob(rule)}
    folders = {path.name for path in (package / "zoo").iterdir() if path.is_dir()} - {"__pycache__"}
    copied = {one for one in folders if not dockerignored(f"dspark_core/zoo/{one}/model.safetensors")}
    assert folders & packed == copied == {DEFAULT_DRAFTER, f"{DEFAULT_MODEL}-ngrams"}
    assert not dockerignored("dspark_core/zoo_paths.py")
    assert dockerignored("docs/api.md")


@pytest.mark.parametrize("name", COMPOSE["services"])
def test_every_container_is_limited_locked_down_and_checked(name):
    service = COMPOSE["services"][name]
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in service["security_opt"]
    assert service["mem_limit"]
    assert service["cpus"] <= 2
    assert service["pids_limit"]
    assert service["healthcheck"]["test"]
    for dependency in service.get("depends_on", {}).values():
        assert dependency == {"condition": "service_healthy"}


def test_what_feeds_a_gpu_is_given_processors():
    """A thread that launches kernels, and the event loop beside it."""
    for name, least in (("drafter", 2), ("verifier", 4)):
        assert ON_GPUS["services"][name]["cpus"] >= least > COMPOSE["services"][name]["cpus"]


def mounted(tmpfs: list[str]) -> dict[str, set[str]]:
    """Options by folder. Docker's own, where none is named, are noexec, nosuid and nodev."""
    return {folder: set(options.split(",")) for folder, _, options in (one.partition(":") for one in tmpfs)}


def test_no_container_without_a_gpu_can_run_what_it_has_written():
    for service in COMPOSE["services"].values():
        assert not any("exec" in options for options in mounted(service.get("tmpfs", [])).values())


def test_on_gpus_the_engines_have_one_folder_for_compiled_kernels():
    assert set(ON_GPUS["services"]) == {"drafter", "verifier"}
    for service in ON_GPUS["services"].values():
        # Compose adds the lists of two files: /tmp stays as it is.
        ((folder, options),) = mounted(service["tmpfs"]).items()
        assert {"exec", "nosuid", "nodev", "mode=0700", "uid=10001", "gid=10001"} <= options
        for variable in ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR"):
            assert service["environment"][variable].startswith(f"{folder}/")
        assert service["build"]["args"] == {"TORCH_LOCAL": "", "TORCH_INDEX": ""}
        assert "read_only" not in service


def test_compose_waits_longer_than_services_drain():
    for name in OWN:
        service = COMPOSE["services"][name]
        grace = int(service["stop_grace_period"].removesuffix("s"))
        assert grace >= int(service["environment"]["DSPARK_DRAIN_SECONDS"]) + 15


def test_only_the_gateway_is_reachable_and_only_from_this_machine():
    published = {
        name: service["ports"] for name, service in COMPOSE["services"].items() if "ports" in service
    }
    assert list(published) == ["gateway"]
    assert all(port.startswith("127.0.0.1:") for port in published["gateway"])
    assert COMPOSE["networks"]["backend"]["internal"] is True


def test_compose_addresses_name_services_and_their_ports():
    ports = {"scheduler": 50052, "verifier": 50053, "drafter": 50054}
    for name in OWN:
        for variable, value in COMPOSE["services"][name]["environment"].items():
            if variable.endswith("_ADDRESS"):
                host, port = value.split(":")
                assert ports[host] == int(port)
                assert variable != "DSPARK_ADVERTISE_ADDRESS" or host == name


def test_versions_agree():
    version = re.search(
        r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), flags=re.MULTILINE
    ).group(1)
    chart = yaml.safe_load((ROOT / "deploy/helm/dspark/Chart.yaml").read_text())
    assert {chart["version"], chart["appVersion"]} == {version}
    assert {COMPOSE["services"][name]["image"] for name in OWN} == {
        f"dspark-{name}:{version}" for name in OWN
    }
    assert {service["image"] for service in ON_GPUS["services"].values()} == {
        f"dspark-{name}:{version}-cuda" for name in ON_GPUS["services"]
    }


def test_the_version_of_vllm_that_is_installed_is_the_one_its_worker_is_written_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    worker = (ROOT / "dspark_core/vllm_engine/worker.py").read_text()
    (minor,) = re.findall(r"Written for the model runner of vLLM 0\.(\d+)", worker)
    assert project["optional-dependencies"]["vllm"] == [f"vllm>=0.{minor},<0.{int(minor) + 1}"]
    told = (ROOT / "docs/vllm.md").read_text()
    assert set(re.findall(r"pip install 'vllm==0\.(\d+)\.\*'|vllm-openai:v0\.(\d+)", told)) == {
        (minor, ""),
        ("", minor),
    }


@pytest.mark.parametrize("service", ["drafter", "verifier"])
def test_engine_images_carry_kernels_compiled_ahead(service):
    inherited = [line for stage in lineage(service) for line in stages()[stage]]
    assert "ENV DSPARK_PREBUILT_KERNELS=/opt/kernels" in inherited
    assert "COPY --from=kernels-build /kernels /opt/kernels" in inherited
    built = " ".join(stages()["kernels-build"])
    assert "python3 -m dspark_core.kernels --prebuild /kernels" in built
    assert "-slim" not in built  # the compiler is in the full image


def test_kernels_are_compiled_from_what_their_stage_copies_with_no_package_installed(tmp_path):
    built = "\n".join(stages()["kernels-build"])
    for source, target in re.findall(r"^COPY (\S+) (\S+)$", built, flags=re.MULTILINE):
        copy = shutil.copytree if (ROOT / source).is_dir() else shutil.copy
        (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
        copy(ROOT / source, tmp_path / target)
    compiler = tmp_path / "cxx"
    compiler.write_text('#!/bin/sh\nfor last; do :; done; touch "$last"\n')
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "-S", "-m", "dspark_core.kernels", "--prebuild", "kernels"],
        cwd=tmp_path,
        env={"CXX": str(compiler)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert list((tmp_path / "kernels").glob("kernels-*.so"))


def test_models_are_given_as_long_to_load_as_the_chart_gives_them():
    for service in ("drafter", "verifier"):
        assert COMPOSE["services"][service]["healthcheck"]["start_period"] == "900s"
