# Sourced by build-guest and build-guest-services: what both make parts of an initrd with, in $cache, under its lock.
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
set -E
umask 022
trap 'echo "${0##*/}: failed at line $LINENO: $BASH_COMMAND" >&2' ERR

cache=$root/.cache/guest

say() { echo "${0##*/}: $*" >&2; }

# Downloads into $cache/packages what is not there yet. One retry with a fresh package list: an old one names files
# that a mirror no longer has.
download() {
  local name missing=()
  mkdir -p "$cache/packages"
  for name in "$@"; do compgen -G "$cache/packages/${name}_*.deb" >/dev/null || missing+=("$name"); done
  [ ${#missing[@]} -eq 0 ] && return
  say "downloading ${missing[*]}"
  rm -rf "$cache/partial" && mkdir "$cache/partial" && cd "$cache/partial"
  apt-get -qq download "${missing[@]}" 2>apt.log || { apt-get -qq update && apt-get -qq download "${missing[@]}" 2>apt.log; } ||
    { cat apt.log >&2; return 1; }
  mv -- *.deb "$cache/packages/"
  cd "$root" && rm -r "$cache/partial"
}

# unpack NAME TREE: a package that was downloaded, its newest version.
unpack() { dpkg-deb -x "$(ls "$cache/packages/${1}"_*.deb | sort -V | tail -n 1)" "$2"; }

# guest_python TREE ARGUMENT...: the Python of the guest, run here out of TREE with its own libraries.
guest_python() {
  local libraries=$1/lib/x86_64-linux-gnu
  PYTHONHOME=$1/usr PYTHONDONTWRITEBYTECODE=1 PYTHONNOUSERSITE=1 \
    "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$1/usr/bin/python3" -S "${@:2}"
}

# archive TREE FILE: a cpio archive that depends on nothing but the content of TREE.
archive() {
  find "$1" -exec touch -h -d @0 {} +
  (cd "$1" && find . -mindepth 1 | LC_ALL=C sort | cpio --quiet --reproducible -o -H newc -R 0:0) >"$2"
}

# when_changed STAMP BUILD FILE...: runs BUILD unless STAMP says that it ran with the same FILEs.
when_changed() {
  local stamp=$cache/$1 build=$2 wanted
  wanted=$(cat "${@:3}" | sha256sum)
  [ -e "${stamp%.stamp}" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ] && return
  rm -f "$stamp"
  $build
  printf '%s\n' "$wanted" >"$stamp"
  say "made $(du -h "$cache/${1%.stamp}" | cut -f 1) $cache/${1%.stamp}"
}

mkdir -p "$cache"
exec 9>"$cache/lock"
flock 9 # two test processes may want the guest at the same time
need_packages cpio
