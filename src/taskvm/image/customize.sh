# Runs on the host, in mmdebstrap's namespaces, with the path of the new root as $1. Turns a fresh Debian into a guest:
# the host's mirror credentials, proxy, name and resolver leave it, and so does everything that differs from one
# build to the next. Reads TASKVM_GUEST_SOURCES and SOURCE_DATE_EPOCH.
set -eu
root=$1

rm -f "$root/taskvm-kernel.deb"
rm -f "$root/etc/apt/sources.list" "$root/etc/apt/apt.conf.d/99mmdebstrap"
printf '%s' "$TASKVM_GUEST_SOURCES" > "$root/etc/apt/sources.list.d/debian.sources"
# A guest is thrown away: translations, recommended packages and kept archives only cost it time.
cat > "$root/etc/apt/apt.conf.d/90taskvm" <<'EOF'
APT::Install-Recommends "false";
APT::Keep-Downloaded-Packages "false";
Acquire::Languages "none";
EOF

# The agent answers DNS on this address (docs/protocol-control.md, "The net port").
echo 'nameserver 127.0.0.1' > "$root/etc/resolv.conf"
echo 'taskvm' > "$root/etc/hostname"
printf '127.0.0.1 localhost taskvm\n::1 localhost\n' > "$root/etc/hosts"
echo 'LANG=C.UTF-8' > "$root/etc/default/locale"
mkdir -p "$root/workspace" "$root/proc" "$root/sys" "$root/dev" "$root/run" "$root/tmp"

rm -rf "$root"/var/cache/debconf/*-old "$root"/var/lib/dpkg/*-old "$root"/var/lib/apt/extended_states.tmp
find "$root/var/log" -xdev -type f -delete
find "$root/usr/share/doc" -xdev -type l -delete
find "$root/usr/share/doc" -xdev -depth -type d -empty -delete

# Python compares the time in a .pyc with its source's, and mke2fs stores times: so times come first, then bytecode.
# With SOURCE_DATE_EPOCH set the packages' scripts wrote bytecode that hashes its source at every import.
find "$root" \( -path "$root/proc" -o -path "$root/sys" -o -path "$root/dev" \) -prune -o \
    -newermt "@$SOURCE_DATE_EPOCH" -exec touch --no-dereference --date="@$SOURCE_DATE_EPOCH" {} +
for library in "$root"/usr/lib/python3.*; do
    version=${library##*/}
    env -u SOURCE_DATE_EPOCH PYTHONHASHSEED=0 chroot "$root" "$version" -m compileall -q -f \
        --invalidation-mode timestamp -x '/lib2to3/tests/' "/usr/lib/$version" /usr/lib/python3
done
