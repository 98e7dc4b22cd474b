#!/bin/bash
# Fetches Debian's stock cloud kernel: proof that a kernel which was not built for this machine boots too.
#
# Prints one path, a directory with
#   bzImage         the kernel as the distribution ships it
#   config          its configuration
#   version         package name and version
#   modules/        NN-NAME.ko, uncompressed, numbered in the order in which an initrd must load them
#   modules/order   the same names, one a line
# Progress and errors go to stderr. The result is cached by package version.
set -euo pipefail

# What an initrd needs before it can mount a root and reach the host; dependencies are added by modules.dep.
readonly MODULES='virtio_pci virtio_blk virtio_net virtio_console virtio-rng virtio_balloon
    vmw_vsock_virtio_transport overlay erofs ext4'
readonly META=linux-image-cloud-amd64
readonly CACHE=${MVM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mvm}/debian-kernel

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $1"
    [ -z "${2:-}" ] || say "  help: $2"
    exit 1
}

usage() {
    say "usage: fetch-debian-kernel.sh [--print-key]"
    exit "${1:-2}"
}

check_tools() {
    local tool missing=()
    for tool in apt-get apt-cache dpkg-deb:dpkg xz:xz-utils flock:util-linux; do
        command -v "${tool%%:*}" >/dev/null || missing+=("${tool##*:}")
    done
    [ ${#missing[@]} -eq 0 ] || die "fetching Debian's kernel needs packages that are missing: ${missing[*]}" \
        "apt-get install ${missing[*]}"
}

# The package that the meta package stands for today, as NAME=VERSION.
real_package() {
    local name version
    name=$(apt-cache depends "$META" 2>/dev/null | awk '$1 == "Depends:" { print $2; exit }')
    [ -n "$name" ] || die "apt knows no package $META" "run apt-get update"
    version=$(apt-cache show --no-all-versions "$name" 2>/dev/null | awk '$1 == "Version:" { print $2; exit }')
    [ -n "$version" ] || die "apt knows no version of $name" "run apt-get update"
    printf '%s=%s\n' "$name" "$version"
}

# Prints the module files under $1 that $MODULES need, dependencies before dependents.
load_order() {
    local dep=$1/modules.dep
    awk -v wanted="$MODULES" '
        function base(path) { sub(/.*\//, "", path); sub(/\.ko.*/, "", path); gsub(/-/, "_", path); return path }
        function visit(name,    i, n, need) {
            if (name in done) return
            done[name] = 1
            n = split(needs[name], need, " ")
            for (i = n; i >= 1; i--) visit(base(need[i]))
            print file[name]
        }
        {
            path = $1; sub(/:$/, "", path); name = base(path); file[name] = path
            $1 = ""; needs[name] = $0
        }
        END {
            n = split(wanted, list, /[ \n]+/)
            for (i = 1; i <= n; i++) {
                name = base(list[i])
                if (name in file) visit(name)
                else print "note: " list[i] " is built in or absent" > "/dev/stderr"
            }
        }' "$dep"
}

# Copies the modules of the tree $1 to $2, uncompressed and numbered.
extract_modules() {
    local tree=$1 out=$2 file name number=0
    mkdir "$out"
    # depmod writes this list at installation; the package as such has none.
    [ -e "$tree/modules.dep" ] || depmod_tree "$tree"
    load_order "$tree" >"$out/list"
    while read -r file; do
        number=$((number + 1))
        name=$(basename "$file" | sed 's/\.ko.*//')
        name=$(printf '%02d-%s.ko' "$number" "$name")
        case $file in
            *.ko.xz) xz -dc "$tree/$file" >"$out/$name" ;;
            *.ko) cp "$tree/$file" "$out/$name" ;;
            *) die "module $file is packed in a way this script does not know" ;;
        esac
        printf '%s\n' "$name" >>"$out/order"
    done <"$out/list"
    rm "$out/list"
}

depmod_tree() {
    local release
    command -v depmod >/dev/null || die "sorting the modules needs depmod" "apt-get install kmod"
    release=$(basename "$1")
    depmod -b "${1%/lib/modules/*}" "$release"
}

fetch() {
    local package=$1 target=$2 work tree
    work=$(mktemp -d "$CACHE/.work.XXXXXX")
    # shellcheck disable=SC2064  # the name is wanted as it is now
    trap "rm -rf '$work'" EXIT
    say "[1/3] download $package"
    (cd "$work" && apt-get -o APT::Sandbox::User=root download -q "$package" >&2) || die "apt-get could not download $package" \
        "check the package sources and run apt-get update"
    say "[2/3] unpack"
    dpkg-deb -x "$work"/*.deb "$work/root"
    # Merged-/usr packages moved the modules.
    tree=$(echo "$work"/root/{usr/,}lib/modules/*/ | tr ' ' '\n' | grep -v '\*' | head -n 1)
    tree=${tree%/}
    say "[3/3] modules"
    mkdir "$work/result"
    extract_modules "$tree" "$work/result/modules"
    cp "$work"/root/boot/vmlinuz-* "$work/result/bzImage"
    cp "$work"/root/boot/config-* "$work/result/config"
    printf '%s\n' "$package" >"$work/result/version"
    mv "$work/result" "$target"
}

main() {
    local package target
    check_tools
    package=$(real_package)
    case ${1:-} in
        '') ;;
        --print-key) printf '%s\n' "$package"; return ;;
        -h | --help) usage 0 ;;
        *) usage ;;
    esac
    target=$CACHE/${package/=/_}
    mkdir -p "$CACHE"
    exec 9>"$CACHE/lock"
    flock 9
    [ -d "$target" ] || fetch "$package" "$target"
    printf '%s\n' "$target"
}

main "$@"
