//! How the guest's TCP behaves: a choice of kernel parameters.

use std::str::FromStr;

/// Named sets of the guest's kernel parameters.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum TcpProfile {
    /// The kernel's own: cubic, buffers sized by memory.
    #[default]
    Default,
    /// For long or lossy ways: BBR, which measures the way instead of waiting for losses; buffers for 32 MiB under way;
    /// data in the first packet for programs that ask for it; no new start after a pause.
    Wan,
}

/// Text that names no profile.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is not a TCP profile: default or wan")]
pub struct NotAProfile(String);

impl TcpProfile {
    /// Kernel parameters and values.
    pub fn sysctls(self) -> Vec<(String, String)> {
        let list: &[(&str, &str)] = match self {
            Self::Default => &[],
            Self::Wan => &[
                ("net.ipv4.tcp_congestion_control", "bbr"),
                ("net.ipv4.tcp_fastopen", "3"),
                ("net.ipv4.tcp_slow_start_after_idle", "0"),
                ("net.ipv4.tcp_mtu_probing", "1"),
                ("net.ipv4.tcp_rmem", "4096 131072 33554432"),
                ("net.ipv4.tcp_wmem", "4096 65536 33554432"),
                ("net.core.rmem_max", "33554432"),
                ("net.core.wmem_max", "33554432"),
            ],
        };
        list.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }
}

impl FromStr for TcpProfile {
    type Err = NotAProfile;

    fn from_str(text: &str) -> Result<Self, NotAProfile> {
        match text {
            "default" => Ok(Self::Default),
            "wan" => Ok(Self::Wan),
            _ => Err(NotAProfile(text.to_owned())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn profiles_go_by_their_names() {
        assert_eq!("default".parse(), Ok(TcpProfile::Default));
        assert_eq!("wan".parse(), Ok(TcpProfile::Wan));
        assert_eq!(
            "lan".parse::<TcpProfile>().unwrap_err().to_string(),
            "\"lan\" is not a TCP profile: default or wan"
        );
    }

    #[test]
    fn this_kernel_knows_every_parameter_of_tcp() {
        assert_eq!(TcpProfile::Default.sysctls(), []);
        for (name, _) in TcpProfile::Wan.sysctls() {
            let path = format!("/proc/sys/{}", name.replace('.', "/"));
            assert!(std::path::Path::new(&path).exists(), "{path}");
        }
    }
}
