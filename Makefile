# The two commands a newcomer needs are `make demo` and `make test`; both set the machine up first.
#
#   make demo     boot a container in a micro-VM and show what each stage took
#   make test     everything: formatting, lints, unit and property tests, end-to-end tests
#   make check    formatting and lints alone
#   make conformance  what VIRTIO asks of devices, row by row, and whether they do it
#   make fuzz     every fuzz target for SECONDS=20    (TARGETS='block layer …' some of them)
#   make crash-matrix  each process killed at each change it makes to the host, and each change failing
#   make containerd containerd's suites whole: every generation that Debian has, runc besides mvm
#   make transcript  from a machine with containerd to pods in machines, step by step
#   make bench    the figures, as ratios in one run       (ONLY=id,… runs some of them)
#   make lab      a command inside the emulated host      (CMD='…', LAB_FLAGS=--deterministic)
#   make build    binaries, guest kernel and agent, laid out as installed under target/dist
#   make kernel   the guest kernel alone                  (prints where it is)
#   make install  to PREFIX, by default /usr/local
#   make deb      a Debian package with all of it
#   make clean    everything that was built; the kernel cache stays

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help setup kernel build install uninstall manual deb demo check test unit conformance fuzz e2e crash-matrix containerd containerd-quick transcript bench lab clean

TARGET := target/x86_64-unknown-linux-gnu
DIST := target/dist
PREFIX ?= /usr/local
CARGO := cargo
RUST_FILES = $(shell git ls-files '*.rs')

help:
	@sed -n 's/^#   //p' Makefile

setup:
	@resources/setup.sh

kernel: setup
	@kernel-config/build.sh

# Everything as it would be installed; the kernel comes from the cache if nothing it depends on changed.
build: setup
	$(CARGO) build --release -p mvm-cli -p mvm-vmm -p mvm-agent -p mvm-shim
	@install -d $(DIST)/bin $(DIST)/share/mvm
	@install -t $(DIST)/bin $(addprefix $(TARGET)/release/,mvm mvm-vmm containerd-shim-mvm-v2)
	@install -t $(DIST)/share/mvm $(TARGET)/release/mvm-agent
	@kernel=$$(kernel-config/build.sh) && cp -f "$$kernel" $(DIST)/share/mvm/vmlinux

install: build
	install -d $(PREFIX)/bin $(PREFIX)/share/mvm
	install -t $(PREFIX)/bin $(addprefix $(DIST)/bin/,mvm mvm-vmm containerd-shim-mvm-v2)
	install -m 644 -t $(PREFIX)/share/mvm $(DIST)/share/mvm/vmlinux
	install -t $(PREFIX)/share/mvm $(DIST)/share/mvm/mvm-agent

uninstall:
	rm -f $(addprefix $(PREFIX)/bin/,mvm mvm-vmm containerd-shim-mvm-v2) $(addprefix $(PREFIX)/share/mvm/,vmlinux mvm-agent)
	[ ! -d $(PREFIX)/share/mvm ] || rmdir $(PREFIX)/share/mvm
	@echo "images, snapshots and templates are left in /var/lib/mvm"

# The manual's pages and what makes shells complete commands, both made by `mvm` itself.
manual: build
	@$(DIST)/bin/mvm manual $(DIST)/share/man/man1
	@install -d $(DIST)/share/{bash-completion/completions,zsh/vendor-completions,fish/vendor_completions.d}
	@$(DIST)/bin/mvm completion bash >$(DIST)/share/bash-completion/completions/mvm
	@$(DIST)/bin/mvm completion zsh >$(DIST)/share/zsh/vendor-completions/_mvm
	@$(DIST)/bin/mvm completion fish >$(DIST)/share/fish/vendor_completions.d/mvm.fish

# target/debian/mvm_*.deb with all of it.
deb: manual
	command -v cargo-deb >/dev/null || $(CARGO) install --locked cargo-deb
	cargo deb -p mvm-cli --no-build --target x86_64-unknown-linux-gnu

demo: build
	@$(CARGO) run -q -p mvm-integration --bin demo

check: setup
	@echo "rustfmt --check"; rustfmt --check --edition 2024 $(RUST_FILES)
	$(CARGO) clippy --workspace --all-targets -- -D warnings

unit: setup
	kernel-config/test.sh
	$(CARGO) test --workspace --exclude mvm-integration --exclude mvm-vmm
	$(CARGO) test -p mvm-vmm --lib
# Machines with flat guests run on any KVM; where there is none, in the lab's.
	if test -w /dev/kvm; then $(CARGO) test -p mvm-vmm --test native; else \
	    $(CARGO) build -q -p mvm-integration --bin lab && \
	    CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUNNER="$(CURDIR)/$(TARGET)/debug/lab --" \
	    $(CARGO) test -p mvm-vmm --test native; fi

# The tests it runs are among those of `make unit`, and so is one that every row names some: `make test` needs no more.
conformance:
	@$(CARGO) run -q -p mvm-devices --features testing --example conformance

# An instrumented build of its own, which the pinned toolchain makes: what the compiler inserts is what libFuzzer reads.
# What the seeds reach is checked by `make unit` without it.
FUZZ_FLAGS := -Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=4 \
    -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table
SECONDS ?= 20
fuzz: setup
	RUSTFLAGS="$(FUZZ_FLAGS)" $(CARGO) build -q -p mvm-fuzz --features libfuzzer --target-dir target/fuzz
	@target/fuzz/x86_64-unknown-linux-gnu/debug/mvm-fuzz run target/fuzz/campaign $(SECONDS) $(TARGETS)

# A stock Debian kernel is one of the guests; it is downloaded and unpacked, not installed.
e2e: build
	debian=$$(kernel-config/fetch-debian-kernel.sh) && MVM_TEST_DEBIAN_KERNEL=$$debian/bzImage $(CARGO) test -p mvm-integration --lib --bins \
	    --test crash --test e2e --test hosts --test kernel_config --test lab --test native --test structure

# Machines are stand-ins, so it needs no KVM that runs Linux; `make e2e` begins with a sample. The last line has the sums.
crash-matrix: build
	$(CARGO) build -q -p mvm-integration --bin crash_matrix --bin fake_machine
	@$(CARGO) run -q -p mvm-integration --bin crash_matrix -- --faults
	@$(CARGO) run -q -p mvm-integration --bin crash_matrix

# containerd is downloaded and unpacked, not installed. Within `make test` ours alone runs, on the newest generation
# and on the oldest, which runs only what differs between them.
containerd: build
	fetched=$$(integration/containerd/fetch.sh) && MVM_TEST_CONTAINERD=$$fetched MVM_TEST_WHOLE=1 \
	    $(CARGO) test -p mvm-integration --test containerd

containerd-quick: build
	fetched=$$(integration/containerd/fetch.sh) && MVM_TEST_CONTAINERD=$$fetched MVM_TEST_RUNTIMES=mvm MVM_TEST_GENERATIONS='2 1.6' \
	    $(CARGO) test -p mvm-integration --test containerd --test transcript

# From a bare machine to pods and back, to read.
transcript: build
	@fetched=$$(integration/containerd/fetch.sh) && MVM_TEST_CONTAINERD=$$fetched \
	    $(CARGO) test -q -p mvm-integration --test transcript >&2
	@cat $(TARGET)/tmp/transcript.txt

test: check unit e2e containerd-quick

bench: build
	$(CARGO) build --release -p mvm-integration --bin bench --bin floor --bin guest_bench
	@fetched=$$(integration/containerd/fetch.sh) && MVM_TEST_CONTAINERD=$$fetched \
	    $(CARGO) run -q --release -p mvm-integration --bin bench -- $(if $(ONLY),--only $(ONLY))

lab: build
	@PATH="$(CURDIR)/$(DIST)/bin:$$PATH" $(CARGO) run -q -p mvm-integration --bin lab -- $(LAB_FLAGS) -- sh -c '$(subst ','\'',$(CMD))'

clean:
	$(CARGO) clean
