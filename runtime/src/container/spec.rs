//! What a user asks of `mvm run`, as the OCI specification that any engine would hand over.

use std::collections::HashSet;
use std::path::PathBuf;
use std::str::FromStr;

use oci_spec::runtime::{
    Capability, Linux, LinuxCapabilities, LinuxPids, LinuxResources, Mount, Process, Root, Spec, User,
    get_default_mounts,
};

use super::process::Overrides;
use crate::failure::Failure;
use crate::image::ImageConfig;

/// Capabilities a container's root has unless its user says otherwise: those docker gives.
const CAPABILITIES: [Capability; 14] = [
    Capability::AuditWrite,
    Capability::Chown,
    Capability::DacOverride,
    Capability::Fowner,
    Capability::Fsetid,
    Capability::Kill,
    Capability::Mknod,
    Capability::NetBindService,
    Capability::NetRaw,
    Capability::Setfcap,
    Capability::Setgid,
    Capability::Setpcap,
    Capability::Setuid,
    Capability::SysChroot,
];

/// What a user asks for besides image and command.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wishes {
    /// Instead of what the image says.
    pub overrides: Overrides,
    /// Host name of the container.
    pub hostname: String,
    /// Refuse writes to the root file system.
    pub read_only: bool,
    /// Its process gets a terminal.
    pub terminal: bool,
    /// Most processes it may have; `None` is as many as fit.
    pub pids: Option<i64>,
    /// Directories and files of the host.
    pub volumes: Vec<Volume>,
    /// Capabilities besides the usual ones, or `ALL`.
    pub cap_add: Vec<CapName>,
    /// Capabilities to take away, or `ALL`.
    pub cap_drop: Vec<CapName>,
    /// Kernel parameters of the guest.
    pub sysctls: Vec<(String, String)>,
}

/// A file or directory of the host in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// On the host, absolute.
    pub source: PathBuf,
    /// In the container, absolute.
    pub target: PathBuf,
    /// The container may not write to it.
    pub read_only: bool,
}

/// One capability, or all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CapName {
    /// All there are.
    All,
    /// One.
    One(Capability),
}

impl FromStr for Volume {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || format!("{text:?} is no volume: HOST:CONTAINER[:ro|:rw], both paths absolute");
        let (paths, read_only) = match text.rsplit_once(':') {
            Some((paths, "ro")) => (paths, true),
            Some((paths, "rw")) => (paths, false),
            _ => (text, false),
        };
        let (source, target) = paths.split_once(':').ok_or_else(wrong)?;
        let volume = Self { source: source.into(), target: target.into(), read_only };
        if !volume.source.is_absolute() || !volume.target.is_absolute() || target.contains(':') {
            return Err(wrong());
        }
        Ok(volume)
    }
}

impl FromStr for CapName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let name = text.to_ascii_uppercase();
        let name = name.strip_prefix("CAP_").unwrap_or(&name);
        match name {
            "ALL" => Ok(Self::All),
            name => Capability::from_str(name)
                .map(Self::One)
                .map_err(|_| format!("there is no capability {text}")),
        }
    }
}

/// The specification of a container of this image.
///
/// # Errors
/// Neither the image nor the user names a program.
pub fn spec(image: &ImageConfig, wishes: &Wishes) -> Result<Spec, Failure> {
    let mut mounts: Vec<Mount> = get_default_mounts();
    mounts.extend(wishes.volumes.iter().map(bind));
    let mut root = Root::default();
    root.set_path("rootfs".into()).set_readonly(Some(wishes.read_only));
    let mut linux = Linux::default();
    if let Some(most) = wishes.pids {
        let mut pids = LinuxPids::default();
        pids.set_limit(most);
        let mut resources = LinuxResources::default();
        resources.set_pids(Some(pids));
        linux.set_resources(Some(resources));
    }
    if !wishes.sysctls.is_empty() {
        linux.set_sysctl(Some(wishes.sysctls.iter().cloned().collect()));
    }
    let mut spec = Spec::default();
    spec.set_process(Some(process(image, wishes)?))
        .set_root(Some(root))
        .set_hostname(Some(wishes.hostname.clone()))
        .set_mounts(Some(mounts))
        .set_linux(Some(linux));
    Ok(spec)
}

fn process(image: &ImageConfig, wishes: &Wishes) -> Result<Process, Failure> {
    let mut user = User::default();
    // Looked up in the container's own user database by the agent.
    let name = wishes.overrides.user.clone().unwrap_or_else(|| image.user.clone());
    user.set_username((!name.is_empty()).then_some(name));
    let cwd = wishes.overrides.cwd.clone().unwrap_or_else(|| image.cwd.clone());
    let mut process = Process::default();
    process
        .set_terminal(Some(wishes.terminal))
        .set_args(Some(wishes.overrides.program(image)?))
        .set_env(Some(wishes.overrides.environment(image, wishes.terminal)))
        .set_cwd(if cwd.is_empty() { "/".into() } else { cwd.into() })
        .set_user(user)
        .set_no_new_privileges(Some(false))
        .set_rlimits(None)
        .set_capabilities(Some(capabilities(wishes)));
    Ok(process)
}

fn capabilities(wishes: &Wishes) -> LinuxCapabilities {
    let mut set: HashSet<Capability> = CAPABILITIES.into();
    // As docker has it: what is dropped goes first, so that ALL can be dropped and some be added.
    for name in &wishes.cap_drop {
        match name {
            CapName::All => set.clear(),
            CapName::One(it) => drop(set.remove(it)),
        }
    }
    for name in &wishes.cap_add {
        match name {
            CapName::All => set.extend(ALL),
            CapName::One(it) => drop(set.insert(*it)),
        }
    }
    let mut capabilities = LinuxCapabilities::default();
    capabilities
        .set_bounding(Some(set.clone()))
        .set_effective(Some(set.clone()))
        .set_permitted(Some(set))
        .set_inheritable(None)
        .set_ambient(None);
    capabilities
}

/// Those docker does not give.
const ALL: [Capability; 27] = [
    Capability::AuditControl,
    Capability::AuditRead,
    Capability::BlockSuspend,
    Capability::Bpf,
    Capability::CheckpointRestore,
    Capability::DacReadSearch,
    Capability::IpcLock,
    Capability::IpcOwner,
    Capability::Lease,
    Capability::LinuxImmutable,
    Capability::MacAdmin,
    Capability::MacOverride,
    Capability::NetAdmin,
    Capability::NetBroadcast,
    Capability::Perfmon,
    Capability::SysAdmin,
    Capability::SysBoot,
    Capability::SysModule,
    Capability::SysNice,
    Capability::SysPacct,
    Capability::SysPtrace,
    Capability::SysRawio,
    Capability::SysResource,
    Capability::SysTime,
    Capability::SysTtyConfig,
    Capability::Syslog,
    Capability::WakeAlarm,
];

fn bind(volume: &Volume) -> Mount {
    let mut mount = Mount::default();
    let access = if volume.read_only { "ro" } else { "rw" };
    mount
        .set_destination(volume.target.clone())
        .set_source(Some(volume.source.clone()))
        .set_typ(Some("bind".to_owned()))
        .set_options(Some(vec!["rbind".to_owned(), access.to_owned()]));
    mount
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> ImageConfig {
        ImageConfig { cmd: vec!["/bin/app".into()], user: "app".into(), ..ImageConfig::default() }
    }

    fn bounding(wishes: &Wishes) -> HashSet<Capability> {
        capabilities(wishes).bounding().clone().unwrap()
    }

    #[test]
    fn an_image_s_user_is_left_to_the_guest_and_its_command_runs() {
        let wishes = Wishes { hostname: "web".into(), pids: Some(7), ..Wishes::default() };
        let spec = spec(&image(), &wishes).unwrap();
        let process = spec.process().as_ref().unwrap();
        assert_eq!(process.args().as_deref(), Some(&["/bin/app".to_owned()][..]));
        assert_eq!(process.user().username().as_deref(), Some("app"));
        let linux = spec.linux().as_ref().unwrap();
        let pids = linux.resources().as_ref().unwrap().pids().as_ref().unwrap();
        assert_eq!((pids.limit(), spec.hostname().as_deref()), (7, Some("web")));
    }

    #[test]
    fn all_and_the_usual_capabilities_are_all_there_are() {
        let all = Wishes { cap_add: vec![CapName::All], ..Wishes::default() };
        assert_eq!(bounding(&all).len(), 41); // CAP_CHECKPOINT_RESTORE, the last, is number 40
        assert_eq!(bounding(&Wishes::default()).len(), 14);
        let one = Wishes {
            cap_drop: vec![CapName::All],
            cap_add: vec!["net_admin".parse().unwrap()],
            ..Wishes::default()
        };
        assert_eq!(bounding(&one), [Capability::NetAdmin].into());
        assert!("CAP_KILL".parse::<CapName>().is_ok() && "fly".parse::<CapName>().is_err());
    }

    #[test]
    fn volumes_are_two_absolute_paths() {
        let volume: Volume = "/a:/b:ro".parse().unwrap();
        assert_eq!((volume.target.to_str().unwrap(), volume.read_only), ("/b", true));
        assert!(!"/a:/b".parse::<Volume>().unwrap().read_only);
        for bad in ["", "/a", "a:/b", "/a:b", "/a:/b:/c", "/a:/b:x"] {
            assert!(bad.parse::<Volume>().is_err(), "{bad}");
        }
    }
}
