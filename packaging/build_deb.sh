#!/usr/bin/env bash
# Build the Debian packages, agent and monitor, into dist/ (make deb).
# Needs Debian 12's dpkg-dev, debhelper, bash-completion, python3-venv, python3-pip.
#   TORCH=cpu|cuda   which build of torch goes in (auto: cpu); the other one's version ends in +cuda
#   WHEELS=DIR       where the agent's wheels are, or shall be, collected (default: build/wheels-cpu or -cuda)
#   MONITOR_WHEELS=DIR  the same for the monitor's (default: build/wheels-monitor)
#   DEBCOMP=OPTIONS  compression, for dpkg-deb (default: -Zzstd, quick; a release takes -Zxz)
#   DIST=DIR         where the packages go (default: dist)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${TORCH:-auto}" in
    auto | cpu) kind=cpu ;;
    cuda) kind=cuda ;;
    *) echo "deb: TORCH=$TORCH is not known; it may be cpu or cuda" >&2; exit 1 ;;
esac
command -v dpkg-buildpackage >/dev/null || { echo "deb: no dpkg-buildpackage; apt install dpkg-dev" >&2; exit 1; }
wheels=$(realpath -m "${WHEELS:-build/wheels-$kind}")
monitor_wheels=$(realpath -m "${MONITOR_WHEELS:-build/wheels-monitor}")
dist=$(realpath -m "${DIST:-dist}")
export DEBCOMP=${DEBCOMP:--Zzstd}
unset MAKEFLAGS # settings of `make deb` are not those of debian/rules, whose names are the same

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

# Debian's own Python makes the environments, so it chooses the wheels
/usr/bin/python3.11 packaging/make_wheels.py fill "$kind" "$wheels"
/usr/bin/python3.11 packaging/make_wheels.py fill monitor "$monitor_wheels"
mkdir "$work/wheels" "$work/wheels-monitor"
ln -s "$wheels"/*.whl "$work/wheels/"
ln -s "$monitor_wheels"/*.whl "$work/wheels-monitor/"
/usr/bin/python3.11 packaging/make_wheels.py own "$work/wheels"
ln -s "$work"/wheels/petals_agent-*.whl "$work/wheels-monitor/"

(cd "$stage" && WHEELS=$work/wheels MONITOR_WHEELS=$work/wheels-monitor \
    dpkg-buildpackage -us -uc -b >"$work/build.log" 2>&1) ||
    { tail -n 40 "$work/build.log" >&2; exit 1; }
mv "$work"/*.deb "$dist/"
ls -l "$dist"/petals-agent_*.deb "$dist"/petals-agent-monitor_*.deb
