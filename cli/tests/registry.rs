//! `mvm image` against a registry: Debian's docker-registry on the loopback of a network name space of its own.

#![allow(missing_docs, clippy::print_stderr)]

use std::fs;
use std::io::{BufRead as _, BufReader, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStderr, Command, Output, Stdio};

use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

/// Enters a network name space of this thread's own, with nothing but loopback.
fn alone() -> bool {
    if !nix::unistd::geteuid().is_root() {
        eprintln!("not tested: only root can have a network of its own");
        return false;
    }
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
    run("ip", &["link", "set", "lo", "up"]);
    true
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}

fn digest(bytes: &[u8]) -> String {
    Sha256::digest(bytes).iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A registry with images in it.
struct Registry {
    dir: tempfile::TempDir,
    process: Option<Child>,
    /// Its log: it ends when nobody listens to it.
    log: Option<BufReader<ChildStderr>>,
}

impl Drop for Registry {
    fn drop(&mut self) {
        if let Some(process) = &mut self.process {
            let _ = process.kill();
            let _ = process.wait();
        }
    }
}

impl Registry {
    fn new() -> Self {
        Self { dir: tempfile::tempdir().unwrap(), process: None, log: None }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn blob_path(&self, hex: &str) -> PathBuf {
        self.path(&format!("storage/docker/registry/v2/blobs/sha256/{}/{hex}/data", &hex[..2]))
    }

    /// Stores a blob as the registry does, linked from a repository.
    fn blob(&self, repository: &str, links: &[&str], bytes: &[u8]) -> String {
        let hex = digest(bytes);
        let put = |path: PathBuf, bytes: &[u8]| {
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        };
        put(self.blob_path(&hex), bytes);
        for link in links {
            let link = link.replace("HEX", &hex);
            let path = format!("storage/docker/registry/v2/repositories/{repository}/{link}/link");
            put(self.path(&path), format!("sha256:{hex}").as_bytes());
        }
        hex
    }

    /// Stores an image of one layer with one file; digests of its layer and manifest.
    fn image(&self, repository: &str, tag: &str, content: &[u8]) -> (String, String) {
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, "file", content).unwrap();
        let layer = tar.into_inner().unwrap();
        let layers = ["_layers/sha256/HEX"];
        let layer_hex = self.blob(repository, &layers, &layer);
        let config = json!({
            "architecture": "amd64", "os": "linux", "config": { "Cmd": ["/bin/true"] },
            "rootfs": { "type": "layers", "diff_ids": [format!("sha256:{layer_hex}")] },
        });
        let config = config.to_string();
        let config_hex = self.blob(repository, &layers, config.as_bytes());
        let blob = |kind: &str, hex: &str, size: usize| json!({ "mediaType": format!("application/vnd.oci.image.{kind}"), "digest": format!("sha256:{hex}"), "size": size });
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": blob("config.v1+json", &config_hex, config.len()),
            "layers": [blob("layer.v1.tar", &layer_hex, layer.len())],
        });
        let manifest = manifest.to_string();
        let revision = "_manifests/revisions/sha256/HEX";
        let manifest_hex = self.blob(repository, &[revision], manifest.as_bytes());
        let entry = json!({
            "mediaType": "application/vnd.oci.image.manifest.v1+json", "digest": format!("sha256:{manifest_hex}"),
            "size": manifest.len(), "platform": { "architecture": "amd64", "os": "linux" },
        });
        let index = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [entry],
        });
        let (current, indexed) =
            (format!("_manifests/tags/{tag}/current"), format!("_manifests/tags/{tag}/index/sha256/HEX"));
        let index_hex = self.blob(repository, &[revision, &current, &indexed], index.to_string().as_bytes());
        (layer_hex, index_hex)
    }

    /// Starts it with more configuration of `http` and `auth`; its address.
    fn start(&mut self, http: &str, more: &str) -> String {
        let config = format!(
            "version: 0.1\nlog: {{level: info}}\nstorage: {{filesystem: {{rootdirectory: {}}}}}\nhttp:\n  addr: 127.0.0.1:0\n{http}{more}",
            self.path("storage").display()
        );
        fs::write(self.path("config.yml"), config).unwrap();
        let mut command = Command::new("docker-registry");
        command.arg("serve").arg(self.path("config.yml")).stdout(Stdio::null()).stderr(Stdio::piped());
        let mut process = command.spawn().expect("docker-registry is installed");
        let mut log = BufReader::new(process.stderr.take().unwrap());
        self.process = Some(process);
        let mut said = String::new();
        while log.read_line(&mut said).unwrap() > 0 {
            if let Some((_, rest)) = said.split_once("listening on ") {
                self.log = Some(log);
                return rest.split(['"', ',']).next().unwrap().to_owned();
            }
        }
        panic!("the registry does not listen: {said}");
    }

    fn mvm(&self, arguments: &[&str], stdin: &str) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mvm"));
        command
            .args(arguments)
            .env("MVM_STATE", self.path("state"))
            .env("DOCKER_CONFIG", self.path("docker"));
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(stdin.as_bytes()).unwrap();
        child.wait_with_output().unwrap()
    }

    /// What a command that works prints.
    fn works(&self, arguments: &[&str], stdin: &str) -> String {
        let output = self.mvm(arguments, stdin);
        assert!(output.status.success(), "{arguments:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a command that fails says.
    fn fails(&self, arguments: &[&str], stdin: &str) -> String {
        let output = self.mvm(arguments, stdin);
        assert_eq!(output.status.code(), Some(1), "{arguments:?}: {output:?}");
        String::from_utf8(output.stderr).unwrap()
    }

    fn list(&self) -> Vec<Value> {
        serde_json::from_str(&self.works(&["image", "ls", "--format", "json"], "")).unwrap()
    }

    /// Files in the images' directory, those of locks apart.
    fn left(&self) -> usize {
        let entries = fs::read_dir(self.path("state/images")).unwrap().flatten();
        entries.filter(|entry| entry.path().extension().is_none_or(|it| it != "lock")).count()
    }
}

#[test]
fn an_image_is_pulled_once_found_by_name_and_removed() {
    if !alone() {
        return;
    }
    let mut registry = Registry::new();
    let (layer, index) = registry.image("some/tool", "1", &[7; 300_000]);
    let address = registry.start("", "");
    let name = format!("{address}/some/tool:1");
    let said = registry.works(&["image", "pull", "--insecure-http", &name], "");
    assert!(said.starts_with(&name) && said.ends_with("added\n"), "{said}");
    let list = registry.list();
    assert_eq!(list.len(), 1);
    assert_eq!(
        (list[0]["name"].as_str(), list[0]["digest"].as_str()),
        (Some(&*name), Some(&*format!("sha256:{index}")))
    );
    assert_eq!(registry.left(), 2, "file system and record, nothing of the download");

    // The layer is not asked for again: it is gone.
    fs::remove_file(registry.blob_path(&layer)).unwrap();
    let said = registry.works(&["image", "pull", "--insecure-http", &name], "");
    assert!(said.ends_with("is there already\n"), "{said}");
    let pinned = format!("{address}/some/tool@sha256:{index}");
    registry.works(&["image", "pull", "--insecure-http", "-q", &pinned], "");
    assert_eq!(registry.list().len(), 2, "one image, two names");
    let said = registry.works(&["image", "rm", &pinned], "");
    assert!(said.contains("has other names"), "{said}");

    // Boots nothing where no machine can run, but knows the image and its command.
    let output = registry.mvm(&["run", &name, "--", ""], "");
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(!said.contains("as an image"), "{said}");
    registry.works(&["image", "rm", &index[..12]], "");
    assert_eq!(registry.left(), 0);
    let said = String::from_utf8(registry.mvm(&["run", &name], "").stderr).unwrap();
    assert!(said.contains(&format!("mvm image pull {name}")), "{said}");
}

#[test]
fn what_is_not_there_or_not_what_it_should_be_is_refused() {
    if !alone() {
        return;
    }
    let mut registry = Registry::new();
    let (layer, _) = registry.image("tool", "1", b"content");
    let path = registry.blob_path(&layer);
    let address = registry.start("", "");
    let (name, missing) = (format!("{address}/tool:1"), format!("{address}/tool:2"));
    let said = registry.fails(&["image", "pull", "--insecure-http", &missing], "");
    assert!(said.contains("manifest unknown") || said.contains("MANIFEST_UNKNOWN"), "{said}");

    let mut bytes = fs::read(&path).unwrap();
    bytes[600] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let said = registry.fails(&["image", "pull", "--insecure-http", &name], "");
    assert!(said.to_lowercase().contains("digest"), "{said}");
    bytes.extend([0; 512]);
    fs::write(&path, &bytes).unwrap();
    let said = registry.fails(&["image", "pull", "--insecure-http", &name], "");
    assert!(said.contains("digest"), "{said}");
    assert!(registry.list().is_empty());
    assert_eq!(registry.left(), 0, "nothing of it stays");

    let said = registry.fails(&["image", "pull", &name], "");
    assert!(said.contains("cannot pull"), "TLS is not spoken here: {said}");
    let said = registry.fails(&["image", "pull", "--insecure-http", "10.0.0.1:5000/tool"], "");
    assert!(said.contains("10.0.0.1:5000 is not on this host") && said.contains("--ca-file"), "{said}");
    let said = registry.fails(&["image", "pull", "127.0.0.1:1/tool"], "");
    assert!(said.contains("Connection refused"), "{said}");
}

#[test]
fn a_registry_that_wants_a_login_gets_it_from_options_or_dockers_configuration() {
    if !alone() {
        return;
    }
    let mut registry = Registry::new();
    registry.image("tool", "1", b"content");
    let hash = Command::new("htpasswd").args(["-Bbn", "me", "secret"]).output().unwrap().stdout;
    fs::write(registry.path("htpasswd"), hash).unwrap();
    let auth =
        format!("auth: {{htpasswd: {{realm: test, path: {}}}}}\n", registry.path("htpasswd").display());
    let address = registry.start("", &auth);
    let name = format!("{address}/tool:1");
    let pull = ["image", "pull", "--insecure-http", &name];
    let said = registry.fails(&pull, "");
    assert!(said.contains("not authorized") && said.contains("--username"), "{said}");
    let login = ["image", "pull", "--insecure-http", "--username", "me", "--password-stdin", &name];
    assert!(registry.fails(&login, "wrong\n").contains("not authorized"));
    assert!(registry.works(&login, "secret\n").ends_with("added\n"));

    fs::create_dir(registry.path("docker")).unwrap();
    // me:secret
    let auths = json!({ "auths": { &*address: { "auth": "bWU6c2VjcmV0" } } });
    fs::write(registry.path("docker/config.json"), auths.to_string()).unwrap();
    assert!(registry.works(&pull, "").ends_with("is there already\n"));
    let output = registry.mvm(&["image", "pull", "--username", "me", &name], "");
    assert_eq!(output.status.code(), Some(2), "a password is not guessed: {output:?}");
}

/// Makes an authority `ca.pem` and the registry's `key.pem` and `cert.pem` of it.
fn certify(directory: &Path) {
    let openssl = |arguments: &str| {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        let output = Command::new("openssl").args(&arguments).current_dir(directory).output().unwrap();
        assert!(output.status.success(), "{arguments:?}: {output:?}");
    };
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    let ca = "-subj /CN=authority -addext basicConstraints=critical,CA:TRUE -keyout ca.key -out ca.pem";
    openssl(&format!("req -x509 {key} -days 2 {ca}"));
    openssl(&format!("req {key} -subj /CN=registry -keyout key.pem -out request"));
    fs::write(directory.join("extensions"), "subjectAltName=IP:127.0.0.1\nbasicConstraints=CA:FALSE\n")
        .unwrap();
    openssl(
        "x509 -req -in request -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -extfile extensions -out cert.pem",
    );
}

#[test]
fn a_registry_is_trusted_by_the_authority_that_is_named() {
    if !alone() {
        return;
    }
    let mut registry = Registry::new();
    registry.image("tool", "1", b"content");
    certify(registry.dir.path());
    let path = |name: &str| registry.path(name).display().to_string();
    let (ca, tls) =
        (path("ca.pem"), format!("  tls: {{certificate: {}, key: {}}}\n", path("cert.pem"), path("key.pem")));
    let address = registry.start(&tls, "");
    let name = format!("{address}/tool:1");
    let said = registry.fails(&["image", "pull", &name], "");
    assert!(said.to_lowercase().contains("certificate"), "{said}");
    assert!(registry.works(&["image", "pull", "--ca-file", &ca, &name], "").ends_with("added\n"));
    let said = registry.fails(&["image", "pull", "--ca-file", "/no/such/ca", &name], "");
    assert!(said.contains("cannot open /no/such/ca"), "{said}");
}

#[test]
fn a_directory_is_imported_listed_and_pruned() {
    let host = Registry::new();
    fs::create_dir(host.path("root")).unwrap();
    fs::write(host.path("root/file"), b"1").unwrap();
    let root = host.path("root").display().to_string();
    let said = host.mvm(&["image", "import", &root], "");
    assert_eq!(said.status.code(), Some(125));
    assert!(String::from_utf8(said.stderr).unwrap().contains(&format!("mvm image import {root} NAME")));
    let said = host.works(&["image", "import", &root, "mine"], "");
    assert!(said.starts_with("docker.io/library/mine:latest "), "{said}");
    let table = host.works(&["image", "ls"], "");
    let lines: Vec<&str> = table.lines().collect();
    assert!(
        lines[0].starts_with("NAME") && lines[1].starts_with("docker.io/library/mine:latest  "),
        "{table}"
    );

    // The name moves on; what it leaves is pruned, what has it is not.
    fs::write(host.path("root/file"), b"22").unwrap();
    host.works(&["image", "import", "-q", &root, "mine"], "");
    assert_eq!(host.list().len(), 2);
    let report: Value =
        serde_json::from_str(&host.works(&["image", "prune", "--format", "json"], "")).unwrap();
    assert_eq!(report["images"]["removed"].as_array().unwrap().len(), 1);
    assert!(report["images"]["freed_bytes"].as_u64().unwrap() > 0);
    assert_eq!(host.list()[0]["name"], "docker.io/library/mine:latest");
    let said = host.works(&["image", "prune", "--all"], "");
    assert!(said.contains("image ") && said.contains("docker.io/library/mine:latest"), "{said}");
    assert!(host.list().is_empty());
    let said = host.fails(&["image", "rm", "mine"], "");
    assert!(said.contains("no cached image mine"), "{said}");
    assert!(Path::new(&root).join("file").exists(), "the original is the user's");
}
