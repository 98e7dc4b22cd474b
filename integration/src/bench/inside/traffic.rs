//! Disk, vsock and network of one guest, ours and QEMU's.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Instant;

use serde_json::{Value, json};

use super::guest::{Job, Results, in_mvm};
use super::qemu::{READERS, in_qemu};
use super::{Files, peer};
use crate::bench::Figure;

/// Reads of each size.
const READS_4K: usize = 500;
const READS_1M: usize = 64;

/// Results with who they are of.
struct Rows(Vec<(String, Results)>);

impl Rows {
    fn json(&self) -> Vec<Value> {
        self.0.iter().map(|(name, results)| json!({"vmm": name, "results": results})).collect()
    }

    /// The least value of all whose name begins with `who`.
    fn least(&self, who: &str, what: &str) -> io::Result<f64> {
        let values =
            self.0.iter().filter(|(name, _)| name.starts_with(who)).filter_map(|(_, found)| found.get(what));
        values.copied().min_by(f64::total_cmp).ok_or_else(|| io::Error::other(format!("no {what} of {who}")))
    }
}

pub(super) fn disk(files: &Files) -> io::Result<Vec<Figure>> {
    let words = format!("bench.read4k={READS_4K} bench.read1m={READS_1M}");
    let job = Job { words: &words, disk: Some(&files.disk), ..Default::default() };
    let mut rows = Rows(Vec::new());
    rows.0.push(("mvm".to_owned(), in_mvm(files, &job, drop)?));
    for reader in READERS {
        rows.0.push((format!("qemu {reader}"), in_qemu(files, &job, reader, false)?));
    }
    rows.0.push(("mvm".to_owned(), in_mvm(files, &job, drop)?));
    rows.0.push(("host".to_owned(), on_host(&files.disk)?));
    let us = |who: &str, what: &str| rows.least(who, what).map(|ns| ns / 1e3);
    let (ours, theirs) = (us("mvm", "read4k_ns")?, us("qemu", "read4k_ns")?);
    let (ours_1m, theirs_1m) = (us("mvm", "read1m_ns")?, us("qemu", "read1m_ns")?);
    let (host, host_1m) = (us("host", "read4k_ns")?, us("host", "read1m_ns")?);
    let mbs = |us: f64| f64::from(1u32 << 20) / us;
    let how_4k = "500 direct reads of 4 KiB at random places, one at a time, guest's clock, virtual time; file in the \
        host's memory; qemu: microvm, virtio-mmio, I/O thread, the better of aio=threads and io_uring, same kernel; host: the same reads of the file \
        by a process of the host, which is the least a guest's read can cost";
    let how_1m = "64 direct reads of 1 MiB in order, one at a time, guest's clock, virtual time; otherwise as \
        lab.blk_read_4k_us";
    let raw = rows.json();
    Ok(vec![
        Figure::new("lab.blk_read_4k_us", ours, "us", how_4k)
            .peer("qemu", theirs)
            .peer("host", host)
            .raw(raw.clone()),
        Figure::new("lab.blk_read_4k_over_qemu", ours / theirs, "x", "lab.blk_read_4k_us over QEMU's")
            .peer("qemu_us", theirs)
            .raw(raw.clone()),
        Figure::new("lab.blk_read_1m_mbs", mbs(ours_1m), "MB/s", how_1m)
            .peer("qemu", mbs(theirs_1m))
            .peer("host", mbs(host_1m))
            .raw(raw.clone()),
        Figure::new(
            "lab.blk_read_1m_over_qemu",
            ours_1m / theirs_1m,
            "x",
            "time of a read of 1 MiB over QEMU's",
        )
        .peer("qemu_us", theirs_1m)
        .raw(raw),
    ])
}

/// The same reads without a guest.
fn on_host(disk: &Path) -> io::Result<Results> {
    let file = File::open(disk)?;
    let mean = |count: usize, len: usize| -> io::Result<f64> {
        let places = file.metadata()?.len() / len as u64;
        let mut buffer = vec![0; len];
        file.read_exact_at(&mut buffer, 0)?;
        let start = Instant::now();
        for place in 0..count as u64 {
            file.read_exact_at(&mut buffer, place % places * len as u64)?;
        }
        Ok(start.elapsed().as_nanos() as f64 / count as f64)
    };
    let results = [("read4k_ns", mean(READS_4K, 4096)?), ("read1m_ns", mean(READS_1M, 1 << 20)?)];
    Ok(results.into_iter().map(|(name, ns)| (name.to_owned(), ns)).collect())
}

pub(super) fn vsock(files: &Files) -> io::Result<Vec<Figure>> {
    let words = format!("bench.vsock={}", peer::VSOCK_PORT);
    let job = Job { words: &words, vsock: true, ..Default::default() };
    let mut rows = Rows(Vec::new());
    rows.0.push(("mvm".to_owned(), in_mvm(files, &job, peer::serve_calls)?));
    peer::serve_vsock()?;
    rows.0.push(("qemu vhost".to_owned(), in_qemu(files, &job, READERS[0], false)?));
    let how = "to a process of the host (ours: UNIX socket; qemu: vhost-vsock, in the host's kernel)";
    exchange(&rows, "vsock", how, &["qemu vhost"])
}

pub(super) fn net(files: &Files) -> io::Result<Vec<Figure>> {
    let words = format!("bench.tap={}", peer::TAP_ADDRESS);
    let job = Job { words: &words, tap: Some(peer::TAP), ..Default::default() };
    peer::serve_tap()?;
    let mut rows = Rows(Vec::new());
    rows.0.push(("mvm".to_owned(), in_mvm(files, &job, drop)?));
    rows.0.push(("qemu".to_owned(), in_qemu(files, &job, READERS[0], false)?));
    rows.0.push(("qemu vhost".to_owned(), in_qemu(files, &job, READERS[0], true)?));
    exchange(&rows, "net", "by TCP over a tap to a process of the host", &["qemu", "qemu vhost"])
}

/// Round trip and stream of one kind.
fn exchange(rows: &Rows, kind: &str, how: &str, peers: &[&str]) -> io::Result<Vec<Figure>> {
    let name = if kind == "net" { "tap" } else { kind };
    let of = |who: &str| -> io::Result<(f64, f64)> {
        let (_, found) = rows
            .0
            .iter()
            .find(|(name, _)| name == who)
            .ok_or_else(|| io::Error::other(format!("no {who}")))?;
        let get = |what: &str| {
            let what = format!("{name}_{what}");
            found.get(&what).copied().ok_or_else(|| io::Error::other(format!("no {what} of {who}")))
        };
        Ok((get("rtt_ns")? / 1e3, get("stream_bytes")? * 1e3 / get("stream_ns")?))
    };
    let (round_trip, stream) = of("mvm")?;
    let mut trip = Figure::new(
        &format!("lab.{kind}_rtt_us"),
        round_trip,
        "us",
        &format!("mean of 500 round trips of 64 bytes {how}, guest's clock, virtual time"),
    );
    let mut flow = Figure::new(
        &format!("lab.{kind}_stream_mbs"),
        stream,
        "MB/s",
        &format!("16 MiB in one stream {how}, guest's clock, virtual time"),
    );
    for peer in peers {
        let (round_trip, stream) = of(peer)?;
        (trip, flow) = (trip.peer(peer, round_trip), flow.peer(peer, stream));
    }
    Ok(vec![trip.raw(rows.json()), flow.raw(rows.json())])
}
