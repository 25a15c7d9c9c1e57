#!/usr/bin/env bash
# Fails when proto/gen is not what scripts/generate_proto.sh makes of proto/dspark_proto.
set -euo pipefail
cd "$(dirname "$0")/.."
fresh="$(mktemp -d)"
trap 'rm -rf "$fresh"' EXIT
scripts/generate_proto.sh "$fresh"
if ! diff -r --exclude=__pycache__ "$fresh" proto/gen; then
  echo "proto/gen is stale: run 'make proto' and commit the result" >&2
  exit 1
fi
