#!/bin/sh
# Makes small OCI images of busybox, for demonstrations and tests that need a container and no network.
#
#     build.sh DIRECTORY [BUSYBOX]
#
# DIRECTORY becomes an OCI image layout with two images: `busybox` (root, runs a shell) and `user` (the same
# file system, runs `id` as user 1000). BUSYBOX is a static busybox, /bin/busybox unless given (Debian:
# busybox-static). Nothing but a shell, tar, gzip, sha256sum and busybox is needed. The same busybox gives the
# same digests.
set -eu

layout=${1:?usage: build.sh DIRECTORY [BUSYBOX]}
busybox=${2:-/bin/busybox}
epoch=1700000000

case $("$busybox" --help 2>&1 | head -n 1) in
    BusyBox*) ;;
    *) echo "$busybox is no busybox" >&2; exit 1 ;;
esac
if [ -e "$layout" ]; then
    echo "$layout exists already" >&2
    exit 1
fi

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
umask 022
mkdir -p "$layout/blobs/sha256"

# digest FILE: prints its sha256 in hex.
digest() {
    sha256sum "$1" | cut -d ' ' -f 1
}

# blob FILE: moves it into the layout and prints `"digest":...,"size":...` of a descriptor.
blob() {
    hex=$(digest "$1")
    printf '"digest":"sha256:%s","size":%s' "$hex" "$(wc -c < "$1")"
    mv "$1" "$layout/blobs/sha256/$hex"
}

# image NAME CONFIG: adds an image of the one layer; prints its entry of the index.
image() {
    printf '{"architecture":"amd64","os":"linux","created":"2023-11-14T22:13:20Z","config":%s,"rootfs":%s}' \
        "$2" "{\"type\":\"layers\",\"diff_ids\":[\"sha256:$diff_id\"]}" > "$work/config"
    printf '{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{%s,%s},"layers":[%s]}' \
        '"mediaType":"application/vnd.oci.image.config.v1+json"' "$(blob "$work/config")" "$layer" > "$work/manifest"
    printf '{"mediaType":"application/vnd.oci.image.manifest.v1+json",%s,"platform":%s,"annotations":%s}' \
        "$(blob "$work/manifest")" '{"architecture":"amd64","os":"linux"}' \
        "{\"org.opencontainers.image.ref.name\":\"$1\"}"
}

# The root file system: busybox under all its names, and what programs expect to find.
root=$work/root
mkdir -p "$root/bin" "$root/dev" "$root/etc" "$root/home/demo" "$root/proc" "$root/root" "$root/run" \
    "$root/sys" "$root/tmp" "$root/usr" "$root/var/log" "$root/var/www"
chmod 1777 "$root/tmp"
chmod 700 "$root/root"
ln -s bin "$root/sbin"
ln -s ../bin "$root/usr/bin"
ln -s ../run "$root/var/run"
cp "$busybox" "$root/bin/busybox"
chmod 755 "$root/bin/busybox"
for applet in $("$busybox" --list); do
    [ "$applet" = busybox ] || ln -s busybox "$root/bin/$applet"
done
cat > "$root/etc/passwd" <<'END'
root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/:/bin/false
demo:x:1000:1000:demo:/home/demo:/bin/sh
nobody:x:65534:65534:nobody:/:/bin/false
END
cat > "$root/etc/group" <<'END'
root:x:0:
daemon:x:1:
tty:x:5:
audio:x:29:demo
demo:x:1000:
nogroup:x:65534:
END
echo 'hello from a micro-VM' > "$root/var/www/index.html"

# /home/demo belongs to its user, all else to root, whoever runs this.
tar="tar --sort=name --format=ustar --numeric-owner --mtime=@$epoch -C $root"
$tar --owner=0 --group=0 --exclude=./home/demo -cf "$work/layer.tar" .
$tar --owner=1000 --group=1000 -rf "$work/layer.tar" ./home/demo
diff_id=$(digest "$work/layer.tar")
gzip -n -9 "$work/layer.tar"
layer="{\"mediaType\":\"application/vnd.oci.image.layer.v1.tar+gzip\",$(blob "$work/layer.tar.gz")}"

path='"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"'
as_root=$(image busybox "{\"Env\":[$path,\"DEMO=mvm\"],\"Cmd\":[\"/bin/sh\"],\"WorkingDir\":\"/\",\"StopSignal\":\"SIGTERM\",\
\"Labels\":{\"io.mvm.demo\":\"busybox\"},\"ExposedPorts\":{\"80/tcp\":{}}}")
as_user=$(image user "{\"Env\":[$path,\"HOME=/home/demo\"],\"Entrypoint\":[\"/bin/sh\",\"-c\"],\
\"Cmd\":[\"id; pwd; touch mine && ls -l mine\"],\"WorkingDir\":\"/home/demo\",\"User\":\"demo\"}")
printf '{"imageLayoutVersion":"1.0.0"}' > "$layout/oci-layout"
printf '{"schemaVersion":2,"manifests":[%s,%s]}' "$as_root" "$as_user" > "$layout/index.json"
echo "$layout:busybox $layout:user"
