//! The daemon's configuration, in the dialects of its generations.

use std::path::Path;

/// What the daemon is told.
#[derive(Clone, Copy, Debug)]
pub struct Settings<'a> {
    /// Where it keeps everything.
    pub dir: &'a Path,
    /// Where CNI plugins are.
    pub plugins: &'a Path,
    /// The pods' own image.
    pub pause: &'a str,
}

/// Version 2 is what 1.x reads.
#[must_use]
pub fn version_2(settings: &Settings<'_>) -> String {
    let cri = "plugins.\"io.containerd.grpc.v1.cri\"";
    let (dir, plugins) = (settings.dir.display(), settings.plugins.display());
    format!(
        r#"version = 2
{common}
[{cri}]
  sandbox_image = "{pause}"
  disable_apparmor = true
  restrict_oom_score_adj = true
  stream_server_address = "127.0.0.1"
[{cri}.cni]
  bin_dir = "{plugins}"
  conf_dir = "{dir}/net.d"
[{cri}.containerd]
  default_runtime_name = "runc"
[{cri}.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
[{cri}.containerd.runtimes.mvm]
  runtime_type = "io.containerd.mvm.v2"
  pod_annotations = ["io.mvm.*"]
  container_annotations = ["io.mvm.*"]
  privileged_without_host_devices = true
"#,
        common = common(settings.dir),
        pause = settings.pause,
    )
}

/// Version 3 is what 2.x reads.
#[must_use]
pub fn version_3(settings: &Settings<'_>) -> String {
    let (images, cri) = ("plugins.'io.containerd.cri.v1.images'", "plugins.'io.containerd.cri.v1.runtime'");
    let (dir, plugins) = (settings.dir.display(), settings.plugins.display());
    format!(
        r#"version = 3
{common}
[{images}.pinned_images]
  sandbox = "{pause}"
[{cri}]
  disable_apparmor = true
  restrict_oom_score_adj = true
[{cri}.cni]
  bin_dirs = ["{plugins}"]
  conf_dir = "{dir}/net.d"
[{cri}.containerd]
  default_runtime_name = "runc"
[{cri}.containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
  sandboxer = "podsandbox"
[{cri}.containerd.runtimes.mvm]
  runtime_type = "io.containerd.mvm.v2"
  sandboxer = "podsandbox"
  pod_annotations = ["io.mvm.*"]
  container_annotations = ["io.mvm.*"]
  privileged_without_host_devices = true
"#,
        common = common(settings.dir),
        pause = settings.pause,
    )
}

fn common(dir: &Path) -> String {
    let dir = dir.display();
    format!(
        r#"root = "{dir}/root"
state = "{dir}/state"
[grpc]
  address = "{dir}/containerd.sock"
[ttrpc]
  address = "{dir}/containerd.sock.ttrpc"
[plugins."io.containerd.internal.v1.opt"]
  path = "{dir}/opt""#
    )
}

/// The network of `ctr run --cni` and of pods: a bridge with addresses of its own, and published ports.
#[must_use]
pub fn network(bridge: &str, subnet: &str, dir: &Path) -> String {
    let leases = dir.join("leases");
    serde_json::json!({
        "cniVersion": "0.4.0",
        "name": "mvm-test",
        "plugins": [
            {
                "type": "bridge", "bridge": bridge, "isGateway": true, "ipMasq": true,
                "ipam": {
                    "type": "host-local", "subnet": subnet, "routes": [{"dst": "0.0.0.0/0"}], "dataDir": leases,
                },
            },
            {"type": "portmap", "capabilities": {"portMappings": true}},
        ],
    })
    .to_string()
}
