"""What tests of patches share: packages on offer for the hosts of a lab, and whether a host has booted."""

from __future__ import annotations

from labtest import Lab

# A package that nobody has, in version 1 installed and in version 2 on offer; on request version 2 wants a boot.
OFFER = """
set -e
repository=/var/local/atlas-check
rm -rf "$repository"; mkdir -p "$repository"; cd "$repository"
for version in 1 2; do
  tree=$(mktemp -d); mkdir "$tree/DEBIAN"; chmod 755 "$tree"
  printf 'Package: atlas-check\\nVersion: %s\\nArchitecture: all\\nMaintainer: none <none@localhost>\\nDescription: check\\n' \\
    "$version" > "$tree/DEBIAN/control"
  if [ "$version" = 2 ] && [ -n "{boot}" ]; then
    printf '#!/bin/sh\\necho atlas-check >> /run/reboot-required.pkgs\\ntouch /run/reboot-required\\n' > "$tree/DEBIAN/postinst"
    chmod 755 "$tree/DEBIAN/postinst"
  fi
  dpkg-deb --build "$tree" "atlas-check_$version.deb" > /dev/null
done
dpkg --install atlas-check_1.deb > /dev/null
"""
# The package that is installed, with a higher version: the maintainer's scripts are the real ones.
OFFER_HAPROXY = """
set -e
repository=/var/local/atlas-check
rm -rf "$repository"; mkdir -p "$repository"; cd "$repository"; chmod 777 .
apt-get -qq update; apt-get -qq download haproxy
tree=$(mktemp -d); dpkg-deb --raw-extract haproxy_*.deb "$tree"; rm haproxy_*.deb
sed -i 's/^Version: .*/&+check1/' "$tree/DEBIAN/control"
dpkg-deb --build "$tree" haproxy_check.deb > /dev/null
"""
# Nothing else is on offer: what Debian published since the lab's image was made might want a boot of its own.
PUBLISH = """
apt-get -qq update
apt-get -qq --simulate upgrade | awk '/^Inst/ && $2 != "haproxy" {print $2}' > "$repository/held"
xargs -r apt-mark -qq hold < "$repository/held"
for deb in $(ls *_2.deb haproxy_check.deb 2> /dev/null); do
  dpkg-deb --field "$deb"
  printf 'Filename: ./%s\\nSize: %s\\nSHA256: %s\\n\\n' "$deb" "$(stat -c %s "$deb")" "$(sha256sum "$deb" | cut -d' ' -f1)"
done > Packages
printf 'Origin: Debian\\nLabel: Debian-Security\\nSuite: check-security\\nDate: %s\\nSHA256:\\n %s %s Packages\\n' \\
  "$(date -Ru)" "$(sha256sum Packages | cut -d' ' -f1)" "$(stat -c %s Packages)" > Release
chmod -R a+rX "$repository"
echo "deb [trusted=yes] file:$repository ./" > /etc/apt/sources.list.d/atlas-check.list
"""
WITHDRAW = """
xargs -r apt-mark -qq unhold < /var/local/atlas-check/held
rm -rf /etc/apt/sources.list.d/atlas-check.list /var/local/atlas-check
"""


def on(lab: Lab, host: str, script: str) -> str:
    """Return what *script* says on *host*; it has to succeed."""
    done = lab.ssh(host, script)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def booted(lab: Lab, host: str) -> str:
    """Return when the first process of *host* began."""
    return on(lab, host, "cut -d' ' -f22 /proc/1/stat")
