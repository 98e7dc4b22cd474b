#!/bin/bash
# From a machine that has containerd to containers and pods in machines of their own, and back: every step a person
# takes, each command shown before its output. `make transcript` runs it in the lab, where the machine is a fresh one.
#
#     transcript.sh DIST POD
#
# DIST is what `make build` lays out; POD the client of the container runtime interface that is built with the tests
# (any other, such as crictl, does as well). containerd, ctr, runc and CNI plugins are those in PATH and CNI_BIN.
# Run it on a machine of your own only if it has no containerd running: it writes to /etc/containerd and /usr/local.
set -euo pipefail
dist=${1:?usage: transcript.sh DIST POD} pod=${2:?usage: transcript.sh DIST POD}
here=$(cd "$(dirname "$0")/../.." && pwd)
plugins=${CNI_BIN:-/usr/lib/cni}

title() { printf '\n## %s\n\n' "$*"; }
# Shows a command, then runs it.
run() {
    printf '$ %s\n' "$*"
    "$@"
}
# Shows a command, and that it ends with this status.
ends() {
    local wanted=$1 status=0
    shift
    run "$@" || status=$?
    printf '(exit status %s)\n' "$status"
    [ "$status" -eq "$wanted" ]
}

title "Install: programs into /usr/local/bin, the guest's kernel and agent beside them"
run install -D -t /usr/local/bin "$dist/bin/containerd-shim-mvm-v2" "$dist/bin/mvm-vmm"
run install -D -t /usr/local/share/mvm "$dist/share/mvm/vmlinux" "$dist/share/mvm/mvm-agent"
unset MVM_PREFIX

title "containerd's configuration: five lines for pods, none for ctr"
case $(containerd --version) in
    *" 1."* | *" v1."*) version=2 lines=config-1.toml image='[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "localhost/mvm/pause:1"
  disable_apparmor = true
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "'$plugins'"' ;;
    *) version=3 lines=config-2.toml image="[plugins.'io.containerd.cri.v1.images'.pinned_images]
  sandbox = 'localhost/mvm/pause:1'
[plugins.'io.containerd.cri.v1.runtime'.cni]
  bin_dirs = ['$plugins']" ;;
esac
run mkdir -p /etc/containerd /etc/cni/net.d
{
    # What this machine needs besides, having no registry: the image of pods, and where its plugins are.
    printf 'version = %s\nroot = "/tmp/containerd"\n%s\n' "$version" "$image"
    cat "$here/resources/containerd/$lines"
} >/etc/containerd/config.toml
run cat "$here/resources/containerd/$lines"
printf '%s' '{"cniVersion":"0.4.0","name":"pods","plugins":[{"type":"bridge","bridge":"pods0","isGateway":true,
    "ipMasq":true,"ipam":{"type":"host-local","subnet":"10.99.0.0/16","routes":[{"dst":"0.0.0.0/0"}]}}]}' \
    >/etc/cni/net.d/10-pods.conflist
exec 3>/tmp/containerd.log
printf '$ containerd &\n'
containerd >&3 2>&3 &
daemon=$!
trap 'kill $daemon' EXIT
for _ in $(seq 300); do ctr version >/dev/null 2>&1 && break; sleep 0.2; done

title "An image, made here because this machine has no network"
run "$here/resources/demo-image/build.sh" /tmp/image
for image in busybox pause; do
    sed "s#\"org.opencontainers.image.ref.name\":\"busybox\"#\"org.opencontainers.image.ref.name\":\"localhost/mvm/$image:1\"#" \
        -i /tmp/image/index.json
    tar -C /tmp/image -cf /tmp/image.tar .
    for namespace in default k8s.io; do ctr -n $namespace image import /tmp/image.tar >/dev/null; done
    sed "s#localhost/mvm/$image:1#busybox#" -i /tmp/image/index.json
done
run ctr image ls -q

title "A container: runc's sees this machine's kernel, mvm's its own"
run uname -r
run ctr run --rm --runtime io.containerd.runc.v2 localhost/mvm/busybox:1 one uname -r
run ctr run --rm --runtime io.containerd.mvm.v2 localhost/mvm/busybox:1 two uname -r
ends 42 ctr run --rm --runtime io.containerd.mvm.v2 localhost/mvm/busybox:1 three sh -c 'echo hello; exit 42'

title "A container in the background, a process in it, its end"
run ctr run -d --null-io --runtime io.containerd.mvm.v2 localhost/mvm/busybox:1 four sleep 1000
run ctr task ls
run ctr task exec --exec-id shell four sh -c 'echo process 1 is $(tr "\0" " " </proc/1/cmdline)'
run ctr task kill -s SIGKILL four
for _ in $(seq 300); do ctr task ls | grep -q 'four.*STOPPED' && break; sleep 0.2; done
run ctr task delete four
run ctr container rm four

title "A pod: two containers, one machine, one network"
printf '$ pod run web\n'
web=$("$pod" run web)
printf '%s\n$ pod start … server\n' "$web"
server=$("$pod" start "$web" server localhost/mvm/busybox:1 httpd -f -p 80 -h /var/www)
printf '%s\n$ pod start … client\n' "$server"
client=$("$pod" start "$web" client localhost/mvm/busybox:1 sleep 1000)
printf '%s\n' "$client"
address=$("$pod" address "$web")
run "$pod" exec "$client" sh -c 'until wget -q -O - http://127.0.0.1/; do sleep 0.2; done'
run busybox wget -q -O - "http://$address/"
run "$pod" remove "$web"

title "Removal: nothing is left"
printf '$ kill %s # containerd\n' "$daemon"
kill "$daemon"
wait "$daemon" || true
trap - EXIT
run rm -f /usr/local/bin/containerd-shim-mvm-v2 /usr/local/bin/mvm-vmm
run rm -rf /usr/local/share/mvm /var/lib/mvm /etc/containerd/config.toml /etc/cni/net.d/10-pods.conflist
# A shim may still tell its last events, and a template that is being made ends beside all else.
for _ in $(seq 150); do
    left=$(pgrep -lf 'mvm-vmm|containerd-shim-mvm' || true)
    [ -n "$left" ] || break
    sleep 0.2
done
printf 'processes of mvm: %s\n' "${left:-none}"
printf 'mounts below /run/mvm: %s\n' "$(grep -c ' /run/mvm' /proc/mounts || true)"
[ -z "$left" ]
printf '\nthe end\n'
