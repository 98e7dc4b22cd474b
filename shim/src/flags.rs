//! The command line containerd gives a shim, in the style of Go's flags: `-x V`, `-x=V`, and two dashes for one.

use mvm_runtime::failure::Failure;

/// What is to be done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Action {
    /// Find or start the daemon for a task and print its address.
    Start,
    /// Be that daemon. Not containerd's word: `start` uses it.
    Serve,
    /// Remove what a daemon that is gone has left.
    Delete,
    /// Describe the runtime.
    Info,
    /// Print the version.
    Version,
}

/// The parsed command line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Flags {
    /// What is to be done.
    pub(crate) action: Action,
    /// containerd's name space of the task.
    pub(crate) namespace: String,
    /// The task's id; for [`Action::Serve`] that of its group.
    pub(crate) id: String,
    /// containerd's own socket.
    pub(crate) address: String,
    /// Path of the bundle, which `delete` is told; everything else runs in it.
    pub(crate) bundle: String,
    /// Log more.
    pub(crate) debug: bool,
}

impl Flags {
    /// Parses the arguments after the program's name.
    pub(crate) fn parse(args: impl IntoIterator<Item = String>) -> Result<Self, Failure> {
        let mut flags = Self {
            action: Action::Serve,
            namespace: String::new(),
            id: String::new(),
            address: String::new(),
            bundle: String::new(),
            debug: false,
        };
        let (mut action, mut asked) = (None, None);
        let mut args = args.into_iter();
        while let Some(arg) = args.next() {
            let Some(name) = arg.strip_prefix("--").or_else(|| arg.strip_prefix('-')) else {
                action = Some(arg);
                break;
            };
            let (name, value) = match name.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (name, None),
            };
            let switched = value.as_deref() != Some("false");
            let mut text = || {
                let value = value.clone().or_else(|| args.next());
                value.ok_or_else(|| Failure::new(format!("flag -{name} needs a value")))
            };
            match name {
                "namespace" => flags.namespace = text()?,
                "id" => flags.id = text()?,
                "address" => flags.address = text()?,
                "bundle" => flags.bundle = text()?,
                // What it did is done over TTRPC now; containerd still passes it. A socket of its choice never is.
                "publish-binary" | "socket" => drop(text()?),
                "debug" => flags.debug = switched,
                "info" if switched => asked = Some(Action::Info),
                "v" | "version" if switched => asked = Some(Action::Version),
                "info" | "v" | "version" => {}
                _ => return Err(Failure::new(format!("unknown flag -{name}"))),
            }
        }
        flags.action = match (asked, action.as_deref()) {
            (Some(asked), _) => asked,
            (None, Some("start")) => Action::Start,
            (None, Some("serve")) => Action::Serve,
            (None, Some("delete")) => Action::Delete,
            (None, Some(other)) => return Err(Failure::new(format!("unknown action {other:?}"))),
            (None, None) => {
                return Err(
                    Failure::new("no action was given").help("containerd runs this program, people run mvm")
                );
            }
        };
        flags.check()?;
        Ok(flags)
    }

    fn check(&self) -> Result<(), Failure> {
        let needs_names = matches!(self.action, Action::Start | Action::Serve | Action::Delete);
        for (name, value) in [("namespace", &self.namespace), ("id", &self.id)] {
            if needs_names && value.is_empty() {
                return Err(Failure::new(format!("flag -{name} is missing")));
            }
            if value.contains('/') || value == ".." || value == "." {
                return Err(Failure::new(format!("flag -{name} is no name: {value:?}")));
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Flags, Failure> {
        Flags::parse(line.split(' ').map(str::to_owned))
    }

    #[test]
    fn the_line_containerd_uses_for_start_is_understood() {
        let line = "-namespace k8s.io -address /run/containerd/containerd.sock -publish-binary /usr/bin/containerd -id c1 -debug start";
        let flags = parse(line).unwrap();
        let expected = Flags {
            action: Action::Start,
            namespace: "k8s.io".to_owned(),
            id: "c1".to_owned(),
            address: "/run/containerd/containerd.sock".to_owned(),
            bundle: String::new(),
            debug: true,
        };
        assert_eq!(flags, expected);
    }

    #[test]
    fn two_dashes_and_equal_signs_mean_the_same() {
        let one = parse("-namespace n -id c -bundle /b delete").unwrap();
        let two = parse("--namespace=n --id=c --bundle=/b delete").unwrap();
        assert_eq!(one, two);
        assert_eq!(one.action, Action::Delete);
    }

    #[test]
    fn flags_that_ask_a_question_need_no_names() {
        assert_eq!(parse("-info").unwrap().action, Action::Info);
        assert_eq!(parse("-v").unwrap().action, Action::Version);
        assert!(parse("-v=false").is_err());
    }

    #[test]
    fn names_that_would_leave_a_directory_are_refused() {
        for line in
            ["-namespace n -id ../x start", "-namespace .. -id x start", "-namespace n -id a/b delete"]
        {
            assert!(parse(line).is_err(), "{line}");
        }
    }

    #[test]
    fn what_is_unknown_or_missing_is_refused() {
        for line in
            ["-namespace n -id x", "-namespace n start", "-wat x start", "-id", "-namespace n -id x dance"]
        {
            assert!(parse(line).is_err(), "{line}");
        }
    }
}
