#!/bin/bash
# Builds the guest kernel from Debian's kernel source and the fragments beside this script.
#
# Prints one path: the uncompressed ELF image `vmlinux`; beside it lie `config`, `System.map` and `version`.
# Progress and errors go to stderr. The result is cached by content: whatever can change the image is in the key.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
readonly here
readonly COMMON=(base kvm-guest virtio filesystems containers network integrity hardening)
readonly SOURCE=${MVM_KERNEL_SOURCE:-/usr/src/linux-source-6.12.tar.xz}
readonly CACHE=${MVM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mvm}/kernel
# How many objects a build compiles, for the percentage alone.
readonly STEPS=1470

variant=smp jobs=$(nproc) out='' action=build

say() { printf '%s\n' "$*" >&2; }

die() {
    say "error: $1"
    [ -z "${2:-}" ] || say "  because: $2"
    [ -z "${3:-}" ] || say "  help: $3"
    exit 1
}

usage() {
    say "usage: build.sh [--variant smp|up|hardened|debug] [--jobs N] [--out DIR] [--print-key | --print-config]"
    say "  --out DIR       also copy the results to DIR"
    say "  --print-key     print the cache key and build nothing"
    say "  --print-config  print the complete checked configuration and build nothing"
    exit "${1:-2}"
}

parse() {
    while [ $# -gt 0 ]; do
        case $1 in
            --variant | --jobs | --out)
                [ $# -ge 2 ] || die "option $1 needs a value"
                printf -v "${1#--}" '%s' "$2"
                shift
                ;;
            --print-key | --print-config) action=${1#--} ;;
            -h | --help) usage 0 ;;
            *) usage ;;
        esac
        shift
    done
    case $variant in smp | up | hardened | debug) ;; *) die "unknown variant '$variant'" '' "use smp, up, hardened or debug" ;; esac
    [[ $jobs =~ ^[1-9][0-9]*$ ]] || die "the number of jobs must be positive, not '$jobs'"
}

# One error for everything that is missing, as Debian packages.
check_tools() {
    local pair missing=()
    for pair in gcc:gcc ld:binutils make:make flex:flex bison:bison bc:bc xz:xz-utils awk:mawk \
        cmp:diffutils flock:util-linux; do
        command -v "${pair%%:*}" >/dev/null || missing+=("${pair##*:}")
    done
    [ -f "$SOURCE" ] && [ -r "$SOURCE" ] || missing+=(linux-source-6.12)
    # objtool reads and writes the objects with libelf.
    if command -v gcc >/dev/null; then
        echo '#include <gelf.h>' | gcc -E -x c - >/dev/null 2>&1 || missing+=(libelf-dev)
    fi
    [ ${#missing[@]} -eq 0 ] || die "the guest kernel cannot be built" "these Debian packages are missing: ${missing[*]}" \
        "apt-get install ${missing[*]}"
}

fragments() {
    case $variant in
        smp | up) printf '%s\n' "${COMMON[@]}" "$variant" ;;
        hardened | debug) printf '%s\n' "${COMMON[@]}" smp "$variant" ;;
    esac
}

# The request: every symbol once, the last fragment that names it wins. Comments do not count.
request() {
    local name
    for name in $(fragments); do cat "$here/$name.config"; done | awk '
        /^CONFIG_[A-Za-z0-9_]+=/ { symbol = substr($0, 1, index($0, "=") - 1); known = 1 }
        /^# CONFIG_[A-Za-z0-9_]+ is not set$/ { symbol = $2; known = 1 }
        known { if (!(symbol in line)) order[++count] = symbol; line[symbol] = $0; known = 0 }
        END { for (i = 1; i <= count; i++) print line[order[i]] }'
}

# The hash of 150 MB of source is remembered as long as the file does not change.
source_hash() {
    local stamp memo=$CACHE/source.sha256
    stamp=$(stat -Lc '%n %i %s %Y' "$SOURCE")
    if [ -r "$memo" ] && [ "$(sed 1q "$memo")" = "$stamp" ]; then
        sed -n 2p "$memo"
        return
    fi
    local hash
    hash=$(sha256sum <"$SOURCE" | cut -d' ' -f1)
    printf '%s\n%s\n' "$stamp" "$hash" >"$memo.$$" && mv "$memo.$$" "$memo"
    printf '%s\n' "$hash"
}

source_version() {
    local version
    version=$(dpkg-query -W -f '${Version}' linux-source-6.12 2>/dev/null) || version=unpackaged
    printf '%s\n' "$version"
}

key() {
    {
        echo "$variant"
        source_version
        source_hash
        gcc --version | head -n 1
        ld --version | head -n 1
        request
        sha256sum <"${BASH_SOURCE[0]}"
    } | sha256sum | cut -c1-32
}

# Runs make as it would run on any machine: nothing of the caller's environment but the search path, and none of the
# tools that the kernel's configuration looks for without need.
kmake() {
    env -i PATH="$PATH" HOME="$work" LC_ALL=C TZ=UTC nice -n 5 make --no-print-directory -C "$tree" O="$work/build" \
        RUSTC=false BINDGEN=false PAHOLE=false KBUILD_BUILD_USER=mvm KBUILD_BUILD_HOST=mvm \
        KBUILD_BUILD_VERSION=1 KBUILD_BUILD_TIMESTAMP="$timestamp" "$@"
}

# The source is unpacked once and shared by all variants.
unpack() {
    local hash
    hash=$(source_hash)
    tree=$CACHE/source/${hash:0:16}
    mkdir -p "$CACHE/source"
    exec 8>"$CACHE/source/lock"
    flock 8
    if [ ! -d "$tree" ]; then
        phase unpack "$SOURCE"
        rm -rf "$CACHE"/source/.part
        mkdir "$CACHE/source/.part"
        # The largest parts of the tree that nothing here reads.
        tar -xJf "$SOURCE" -C "$CACHE/source/.part" --strip-components=1 \
            --exclude='*/drivers/gpu/drm/amd/include' --exclude='*/tools/testing' --exclude='*/Documentation/translations'
        mv "$CACHE/source/.part" "$tree"
    fi
    exec 8>&-
    # The source's own date, so that the same source gives the same image on any day.
    timestamp=$(TZ=UTC LC_ALL=C date -d "@$(stat -c %Y "$tree/Makefile")")
}

phase() { say "[$(printf '%3d' $SECONDS) s] $1${2:+: $2}"; }

# Writes the full configuration and fails with the list of requests that Kconfig did not grant.
configure() {
    phase configure "$variant"
    mkdir -p "$work/build"
    request >"$work/request"
    kmake -s KCONFIG_ALLCONFIG="$work/request" allnoconfig >"$work/configure.log" 2>&1 ||
        die "configuring the kernel failed" "$(tail -n 3 "$work/configure.log")"
    local refused
    refused=$(awk '
        NR == FNR { if (/^CONFIG_/) { i = index($0, "="); value[substr($0, 1, i - 1)] = substr($0, i + 1) } next }
        /^CONFIG_/ { i = index($0, "="); symbol = substr($0, 1, i - 1); want = substr($0, i + 1) }
        /^#/ { symbol = $2; want = "n" }
        { have = (symbol in value) ? value[symbol] : "n"
          if (have != want) print "    " symbol ": wanted " want ", is " have }' "$work/build/.config" "$work/request")
    [ -z "$refused" ] || die "Kconfig did not grant what the fragments ask for:
$refused" '' "a dependency is missing or another option selects it: look the symbol up with make menuconfig"
}

# Shows how far the compilation is: in place on a terminal, every tenth part elsewhere.
progress() {
    local pid=$1 finished percent shown=-1
    while kill -0 "$pid" 2>/dev/null; do
        finished=$(grep -cE '^  (CC|AS) ' "$work/build.log" || true)
        percent=$((finished * 100 / STEPS))
        [ $percent -lt 99 ] || percent=99
        if [ -t 2 ]; then
            printf '\r[%3d s] compile: %2d %% ' $SECONDS $percent >&2
        elif [ $((percent / 10)) -gt $((shown / 10)) ] || [ $shown -lt 0 ]; then
            phase compile "$percent %"
            shown=$percent
        fi
        sleep 1
    done
    [ ! -t 2 ] || printf '\r' >&2
}

compile() {
    : >"$work/build.log"
    kmake -j"$jobs" vmlinux >"$work/build.log" 2>&1 &
    local pid=$!
    progress $pid
    if ! wait $pid; then
        cp "$work/build.log" "$CACHE/failed.log"
        die "compiling the kernel failed" "$(grep -m 3 -iE 'error|No space' "$work/build.log" || tail -n 3 "$work/build.log")" \
            "the whole log is $CACHE/failed.log"
    fi
}

# Moves the results into the cache in one step.
publish() {
    local target=$1 result=$work/result
    phase strip
    mkdir "$result"
    objcopy --strip-all "$work/build/vmlinux" "$result/vmlinux"
    cp "$work/build/.config" "$result/config"
    cp "$work/build/System.map" "$result/System.map"
    {
        kmake -s kernelrelease
        echo "variant $variant"
        echo "source linux-source-6.12 $(source_version)"
        echo "compiler $(gcc --version | head -n 1)"
    } >"$result/version"
    rm -rf "$target"
    mv "$result" "$target"
    phase ready "$(size "$target/vmlinux" |
        awk 'NR == 2 { printf "text %d kB, data %d kB, bss %d kB", $1 / 1024, $2 / 1024, $3 / 1024 }')"
}

build() {
    local target=$1
    # What a killed build left behind.
    find "$CACHE" -maxdepth 1 -name '.work.*' -mmin +1440 -exec rm -rf {} +
    work=$(mktemp -d "$CACHE/.work.XXXXXX")
    trap 'rm -rf "$work"' EXIT
    unpack
    configure
    [ "$action" = build ] || { cat "$work/build/.config"; return; }
    compile
    publish "$target"
}

main() {
    parse "$@"
    check_tools
    mkdir -p "$CACHE/locks"
    local id target
    id=$(key)
    target=$CACHE/$id
    case $action in
        print-key) printf '%s\n' "$id"; return ;;
        print-config) build ''; return ;;
    esac
    exec 9>"$CACHE/locks/$id"
    flock -n 9 || { say "another build of this kernel is running: waiting for it"; flock 9; }
    [ -e "$target/vmlinux" ] || build "$target"
    if [ -n "$out" ]; then
        mkdir -p "$out"
        cp "$target"/{vmlinux,config,System.map,version} "$out/"
    fi
    printf '%s\n' "$target/vmlinux"
}

main "$@"
