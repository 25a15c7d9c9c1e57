"""One release for all tests, in a namespace of its own, on the cluster of DSPARK_CLUSTER_KUBECONFIG."""

import os
import shutil
import uuid
from collections.abc import Iterator

import pytest

from tests.cluster.cluster import RELEASE, Cluster
from tests.integration.deploy.helm import find


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    kubeconfig = os.environ.get("DSPARK_CLUSTER_KUBECONFIG")
    if not kubeconfig:
        pytest.skip("DSPARK_CLUSTER_KUBECONFIG does not name a cluster whose nodes have the images")
    helm = find(os.environ.get("DSPARK_CLUSTER_HELM", "helm-3"))
    assert helm is not None, "make tools"
    assert shutil.which("kubectl"), "kubectl is not on PATH"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KUBECONFIG", kubeconfig)
        one = Cluster(helm, f"dspark-test-{uuid.uuid4().hex[:8]}")
        try:
            one.install()
            yield one
            one.run_helm("uninstall", RELEASE, "--wait")
        finally:
            one.run_kubectl("delete", "namespace", one.namespace, "--wait=false")
