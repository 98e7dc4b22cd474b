//! `mvm image pull` from a registry that means harm: answers without end, answers that lead elsewhere, lies.

#![allow(missing_docs)]

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::{TcpListener, TcpStream};
use std::process::{Command, Output};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use sha2::{Digest as _, Sha256};

/// More than is ever read of a document.
const TOO_MUCH: usize = 64 << 20;

/// What is answered to one path.
enum Answer {
    /// Status and headers, then bytes.
    Whole(&'static str, Vec<u8>),
    /// Status and headers, then bytes until nobody wants more.
    Endless(&'static str),
}

/// A registry on the loopback, and what it has seen.
struct Hostile {
    address: String,
    paths: Arc<Mutex<Vec<String>>>,
    /// Bytes of its longest answer.
    sent: Arc<Mutex<usize>>,
}

impl Hostile {
    fn new(answer: impl Fn(&str) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let (paths, sent) = (Arc::new(Mutex::default()), Arc::new(Mutex::default()));
        let seen = (Arc::clone(&paths), Arc::clone(&sent));
        let answer = Arc::new(answer);
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (answer, seen) = (Arc::clone(&answer), (Arc::clone(&seen.0), Arc::clone(&seen.1)));
                std::thread::spawn(move || {
                    // Whoever asked may go at any time.
                    let _ = serve(stream.unwrap(), &*answer, &seen);
                });
            }
        });
        Self { address, paths, sent }
    }

    /// Pulls from it; the output, and it must not take long.
    fn pull(&self, name: &str) -> Output {
        let state = tempfile::tempdir().unwrap();
        let begun = Instant::now();
        let mut command = Command::new(env!("CARGO_BIN_EXE_mvm"));
        command.args(["image", "pull", "--insecure-http", &format!("{}/{name}", self.address)]);
        command.env("MVM_STATE", state.path()).env("DOCKER_CONFIG", state.path());
        let output = command.output().unwrap();
        assert!(begun.elapsed() < Duration::from_secs(60), "{output:?}");
        output
    }

    /// What a pull that fails says.
    fn refused(&self, name: &str) -> String {
        let output = self.pull(name);
        assert_eq!(output.status.code(), Some(1), "{output:?}");
        assert!(*self.sent.lock().unwrap() < TOO_MUCH, "{output:?}");
        String::from_utf8(output.stderr).unwrap()
    }
}

type Seen = (Arc<Mutex<Vec<String>>>, Arc<Mutex<usize>>);

fn serve(stream: TcpStream, answer: &dyn Fn(&str) -> Answer, seen: &Seen) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut to = stream;
    loop {
        let mut request = String::new();
        if reader.read_line(&mut request)? == 0 {
            return Ok(());
        }
        let mut header = String::from("x");
        while !header.trim().is_empty() {
            header.clear();
            reader.read_line(&mut header)?;
        }
        let path = request.split(' ').nth(1).unwrap_or_default().to_owned();
        seen.0.lock().unwrap().push(path.clone());
        match answer(&path) {
            Answer::Whole(head, bytes) => {
                let length = bytes.len();
                to.write_all(format!("HTTP/1.1 {head}\r\nContent-Length: {length}\r\n\r\n").as_bytes())?;
                to.write_all(&bytes)?;
            }
            Answer::Endless(head) => {
                to.write_all(format!("HTTP/1.1 {head}\r\n\r\n").as_bytes())?;
                for count in 1.. {
                    to.write_all(b"1000\r\n")?;
                    to.write_all(&[b' '; 0x1000])?;
                    to.write_all(b"\r\n")?;
                    let mut sent = seen.1.lock().unwrap();
                    *sent = sent.max(count * 0x1000);
                    assert!(*sent < 2 * TOO_MUCH, "{path} is read for ever");
                }
            }
        }
    }
}

const CHUNKED: &str = "200 OK\r\nTransfer-Encoding: chunked";
const NOT_THERE: &str = "404 Not Found";

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

#[test]
fn a_manifest_without_end_is_read_to_its_bound() {
    let said = Hostile::new(|_| Answer::Endless(CHUNKED)).refused("x:1");
    assert!(said.contains("bytes of an index or a manifest") && said.contains("4194304"), "{said}");
    let said = Hostile::new(|_| Answer::Endless("200 OK\r\nContent-Length: 1099511627776")).refused("x:1");
    assert!(said.contains("bytes of an index or a manifest"), "{said}");
}

#[test]
fn a_token_without_end_and_a_refusal_without_end_are_read_to_their_bounds() {
    const ASK: &str = "401 Unauthorized\r\nWWW-Authenticate: Bearer realm=\"http://localhost:PORT/token\"";
    let port = Arc::new(Mutex::new(String::new()));
    let own = Arc::clone(&port);
    let hostile = Hostile::new(move |path| match path.starts_with("/token") {
        true => Answer::Endless(CHUNKED),
        false => Answer::Whole(ASK.replace("PORT", &own.lock().unwrap()).leak(), Vec::new()),
    });
    *port.lock().unwrap() = hostile.address.rsplit(':').next().unwrap().to_owned();
    let said = hostile.refused("x:1");
    assert!(said.contains("bytes of a registry's token"), "{said}");
    let paths = hostile.paths.lock().unwrap();
    assert!(paths[1].starts_with("/token?scope=repository%3Ax%3Apull"), "{paths:?}");
    drop(Hostile::new(|_| Answer::Endless("404 Not Found\r\nTransfer-Encoding: chunked")).refused("x:1"));
}

#[test]
fn nobody_but_this_host_is_asked_without_tls_wherever_a_registry_leads() {
    for lead in [
        "401 Unauthorized\r\nWWW-Authenticate: Bearer realm=\"http://192.0.2.1/token\",service=\"x\"",
        "307 Temporary Redirect\r\nLocation: http://192.0.2.1/v2/x/manifests/1",
        "307 Temporary Redirect\r\nLocation: /v2/x/manifests/1",
    ] {
        let hostile = Hostile::new(move |_| Answer::Whole(lead, Vec::new()));
        let said = hostile.refused("x:1");
        let why = ["192.0.2.1 is not on this host", "TLS is not spoken", "again and again"];
        assert!(why.iter().any(|why| said.contains(why)), "{said}");
        assert!(hostile.paths.lock().unwrap().len() < 10);
    }
}

#[test]
fn what_a_registry_says_is_not_obeyed_by_a_terminal() {
    let said =
        Hostile::new(|_| Answer::Whole(NOT_THERE, b"\x1b]0;owned\x07\xc2\x9b2J".to_vec())).refused("x:1");
    assert!(said.contains("404") && said.contains("owned"), "{said}");
    assert!(!said.chars().any(|it| it.is_control() && it != '\n'), "{said:?}");
}

/// An image whose manifest announces a configuration of `size` bytes, which never ends.
fn with_configuration(size: u64) -> Hostile {
    let config = digest(b"config");
    let manifest = format!(
        r#"{{"schemaVersion":2,"config":{{"mediaType":"application/vnd.oci.image.config.v1+json",
           "digest":"sha256:{config}","size":{size}}},"layers":[]}}"#
    );
    Hostile::new(move |path| match path.contains("/manifests/") {
        true => Answer::Whole("200 OK", manifest.clone().into_bytes()),
        false => Answer::Endless(CHUNKED),
    })
}

#[test]
fn a_configuration_is_read_to_what_was_announced_and_that_has_a_bound() {
    let said = with_configuration(100).refused("x:1");
    assert!(said.contains("100 bytes") && said.contains("more"), "{said}");
    let large = with_configuration(5 << 20);
    let said = large.refused("x:1");
    assert!(said.contains("bytes of an image"), "{said}");
    assert_eq!(large.paths.lock().unwrap().len(), 1, "it is not asked for");
}

#[test]
fn a_manifest_that_is_not_the_one_of_its_digest_is_refused() {
    let hostile = Hostile::new(|_| Answer::Whole("200 OK", b"{\"schemaVersion\":2}".to_vec()));
    let said = hostile.refused(&format!("x@sha256:{}", digest(b"another")));
    assert!(said.contains(&digest(b"another")), "{said}");
}
