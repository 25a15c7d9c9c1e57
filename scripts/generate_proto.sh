#!/usr/bin/env bash
# Regenerates proto/gen from proto/dspark_proto. CI fails when the committed code is stale.
set -euo pipefail
cd "$(dirname "$0")/.."
out="${1:-proto/gen}"
python="${PYTHON:-python}"
mkdir -p "$out"
"$python" -m grpc_tools.protoc -I proto --python_out="$out" --pyi_out="$out" --grpc_python_out="$out" \
  proto/dspark_proto/v1/*.proto
touch "$out/dspark_proto/__init__.py" "$out/dspark_proto/v1/__init__.py"
