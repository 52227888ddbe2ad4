#!/usr/bin/env bash
# Build the Debian package into dist/ (make deb). Needs Debian 12's dpkg-dev, debhelper, bash-completion, python3-venv, python3-pip.
#   TORCH=cpu|cuda   which build of torch goes in (auto: cpu); the other one's version ends in +cuda
#   WHEELS=DIR       where its wheels are, or shall be, collected (default: build/wheels-cpu or -cuda)
#   DEBCOMP=OPTIONS  compression, for dpkg-deb (default: -Zzstd, quick; a release takes -Zxz)
#   DIST=DIR         where the package goes (default: dist)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${TORCH:-auto}" in
    auto | cpu) kind=cpu ;;
    cuda) kind=cuda ;;
    *) echo "deb: TORCH=$TORCH is not known; it may be cpu or cuda" >&2; exit 1 ;;
esac
command -v dpkg-buildpackage >/dev/null || { echo "deb: no dpkg-buildpackage; apt install dpkg-dev" >&2; exit 1; }
wheels=$(realpath -m "${WHEELS:-build/wheels-$kind}")
dist=$(realpath -m "${DIST:-dist}")
export DEBCOMP=${DEBCOMP:--Zzstd}

mkdir -p build "$dist"
work=$(mktemp -d "$PWD/build/deb-XXXXXX")
trap 'rm -rf "$work"' EXIT
stage=$work/petals-agent
mkdir "$stage"
cp -r packaging/debian "$stage/debian"
mkdir "$stage/packaging"
cp packaging/man_pages.py "$stage/packaging/"
cp -r systemd petals-agent.toml "$stage/"
(cd "$stage" && dpkg-checkbuilddeps)
[ "$kind" = cpu ] || sed -i '1s/)/+cuda)/' "$stage/debian/changelog"

# Debian's own Python makes the environment, so it chooses the wheels
/usr/bin/python3.11 packaging/make_wheels.py fill "$kind" "$wheels"
mkdir "$work/wheels"
ln -s "$wheels"/*.whl "$work/wheels/"
/usr/bin/python3.11 packaging/make_wheels.py own "$work/wheels"

(cd "$stage" && WHEELS=$work/wheels dpkg-buildpackage -us -uc -b >"$work/build.log" 2>&1) ||
    { tail -n 40 "$work/build.log" >&2; exit 1; }
mv "$work"/petals-agent_*.deb "$dist/"
ls -l "$dist"/petals-agent_*.deb
