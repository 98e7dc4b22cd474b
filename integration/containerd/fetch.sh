#!/bin/bash
# Fetches what the containerd suites run: every generation of containerd that Debian has, runc, and CNI plugins.
#
# Packages are unpacked into a cache, never installed. Newer generations come from the suites of LATER through an
# apt of its own: its lists and state are below the cache, the system's sources stay as they are.
#
# Prints one directory, with
#   generations       a line for each containerd: GENERATION DIRECTORY
#   NAME_VERSION/     containerd, containerd-shim-runc-v2 and ctr, or runc, or CNI plugins
#   runc, cni         links to theirs
# Progress, and which generations could not be had, go to stderr. A result younger than a week is used as it is.
set -euo pipefail

readonly GENERATIONS='1.6 1.7 2'
readonly LATER='bookworm trixie sid'
readonly PLUGINS='bridge host-local loopback portmap'
readonly CACHE=${MVM_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/mvm}/containerd
readonly OWN=$CACHE/apt

say() { printf 'containerd: %s\n' "$*" >&2; }

die() {
    say "error: $1"
    say "  help: $2"
    exit 1
}

# The address that the system's own apt gets Debian from.
mirror() {
    local address
    address=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' 2>/dev/null |
        grep -m 1 '/debian/*$' || true)
    printf '%s\n' "${address:-http://deb.debian.org/debian}"
}

# Runs an apt tool on the suites of LATER. A mirror may stand still for longer than its lists say they hold: what is in
# them is signed all the same.
later() {
    local tool=$1
    shift
    "$tool" -q -o Dir::Etc::sourcelist="$OWN/later.sources" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::lists="$OWN/lists" -o Dir::Cache="$OWN/cache" -o Dir::State::status=/dev/null \
        -o Acquire::Languages=none -o Acquire::Check-Valid-Until=false -o APT::Sandbox::User="$(id -un)" "$@"
}

update() {
    mkdir -p "$OWN/lists/partial" "$OWN/cache/archives/partial"
    printf 'Types: deb\nURIs: %s\nSuites: %s\nComponents: main\nSigned-By: %s\n' "$(mirror)" "$LATER" \
        /usr/share/keyrings/debian-archive-keyring.gpg >"$OWN/later.sources"
    later apt-get update >&2 || say "the lists of $LATER could not be refreshed"
}

# The newest version of containerd in generation $1.
newest() {
    later apt-cache madison containerd 2>/dev/null | awk -F '|' '{ gsub(/ /, "", $2); print $2 }' |
        grep "^${1//./\\.}\\." | sort -V | tail -n 1
}

# unpack COMMAND… NAME=VERSION FILE…: downloads a package by COMMAND and keeps the files. Prints their directory.
unpack() {
    local command=$1 package=$2 target=$CACHE/${2/=/_} work file
    shift 2
    if [ ! -d "$target" ]; then
        work=$(mktemp -d "$CACHE/.work.XXXXXX")
        say "downloading $package"
        if ! (cd "$work" && $command download "$package" >&2); then
            rm -rf "$work"
            return 1
        fi
        dpkg-deb -x "$work"/*.deb "$work/root"
        mkdir "$work/kept"
        for file in "$@"; do cp "$work/root/$file" "$work/kept/"; done
        chmod 755 "$work/kept"
        mv "$work/kept" "$target"
        rm -rf "$work"
    fi
    printf '%s\n' "$target"
}

# The version of package $1 that the system itself would install: it runs with the libraries that are here.
own_version() {
    apt-cache policy "$1" | awk '$1 == "Candidate:" && $2 != "(none)" { print $2 }'
}

# link NAME PACKAGE FILE…: the system's version of a package, as NAME.
link() {
    local name=$1 package=$2 version
    shift 2
    version=$(own_version "$package")
    [ -n "$version" ] || die "apt knows no $package" "run apt-get update"
    ln -sfn "$(unpack "apt-get -q -o APT::Sandbox::User=$(id -un)" "$package=$version" "$@")" "$CACHE/$name" ||
        die "$package could not be downloaded" "check the package sources and run apt-get update"
}

fetch() {
    local generation version dir list=$CACHE/generations.partial
    update
    : >"$list"
    for generation in $GENERATIONS; do
        version=$(newest "$generation") || true
        if [ -n "$version" ] && dir=$(unpack 'later apt-get' "containerd=$version" \
            usr/bin/containerd usr/bin/containerd-shim-runc-v2 usr/bin/ctr); then
            printf '%s %s\n' "$generation" "$dir" >>"$list"
        else
            # What an earlier fetch left is as good.
            say "generation $generation cannot be had now"
            grep "^$generation " "$CACHE/generations" 2>/dev/null >>"$list" || true
        fi
    done
    [ -s "$list" ] || die "no generation of containerd could be had" "check that $(mirror) can be reached"
    link runc runc usr/sbin/runc
    # shellcheck disable=SC2046 # a list of words
    link cni containernetworking-plugins $(printf 'usr/lib/cni/%s ' $PLUGINS)
    mv "$list" "$CACHE/generations"
}

main() {
    [ $# -eq 0 ] || die "usage: fetch.sh" "it takes no arguments"
    mkdir -p "$CACHE"
    exec 9>"$CACHE/lock"
    flock 9
    if [ -z "$(find "$CACHE/generations" -mtime -7 2>/dev/null)" ]; then fetch; fi
    say "generations: $(while read -r generation dir; do printf '%s (%s) ' "$generation" "${dir##*_}"; done \
        <"$CACHE/generations")"
    printf '%s\n' "$CACHE"
}

main "$@"
