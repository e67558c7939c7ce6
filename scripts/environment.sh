# Sourced by the other scripts: $root, and `need_packages NAME...`, `need_environment [test]`.
# Installs only what is missing, says what it does, and is quick when there is nothing to do.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"

need_packages() {
  local missing=() name
  for name in "$@"; do
    dpkg-query -W -f '${db:Status-Status}\n' "$name" 2>/dev/null | grep -qx installed || missing+=("$name")
  done
  [ ${#missing[@]} -eq 0 ] && return
  echo "installing Debian packages: ${missing[*]}" >&2
  apt-get -qq update
  DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends "${missing[@]}" >/dev/null
}

# A virtual environment in .venv with the pinned versions of scripts/requirements.txt and this checkout, editable.
need_environment() {
  local python=${PYTHON:-python3} stamp=.venv/.installed wanted
  wanted=$(cat pyproject.toml scripts/requirements.txt | sha256sum)
  if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    "$python" -c 'import ensurepip, venv' 2>/dev/null || need_packages python3-venv
    echo "making a virtual environment in .venv" >&2
    rm -rf .venv
    "$python" -m venv .venv
    .venv/bin/python -m pip -q --disable-pip-version-check install -r scripts/requirements.txt
    .venv/bin/python -m pip -q --disable-pip-version-check install --no-deps -e .
    printf '%s\n' "$wanted" >"$stamp"
  fi
  export PATH="$root/.venv/bin:$PATH"
}
