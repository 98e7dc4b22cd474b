//! The process of a container: what the image says, what the user says instead, and what becomes of it.

use std::collections::HashSet;

use mvm_protocol::{PidNamespace, User};

use super::ROOT;
use crate::agent::{Error as AgentError, ProcessSpec, StdioSpec};
use crate::failure::Failure;
use crate::image::ImageConfig;

/// Where programs are looked for when the image does not say.
const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What a user says instead of the image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Overrides {
    /// Program instead of the image's entry point; the image's command is then not used either.
    pub entrypoint: Option<String>,
    /// Command instead of the image's.
    pub command: Vec<String>,
    /// Variables on top of the image's, `NAME=value`.
    pub env: Vec<String>,
    /// Working directory.
    pub cwd: Option<String>,
    /// `user[:group]`.
    pub user: Option<String>,
}

/// The program cannot be run: it is not there, or cannot be executed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct NotRunnable {
    message: String,
    /// What a command line exits with: 127 if there is no such program, 126 if it cannot be executed.
    pub exit_code: u8,
}

impl Overrides {
    /// The process an image and these overrides ask for.
    ///
    /// # Errors
    /// Neither names a program.
    pub fn process(&self, image: &ImageConfig, stdio: StdioSpec) -> Result<ProcessSpec, Failure> {
        let args = self.program(image)?;
        let cwd = self.cwd.clone().unwrap_or_else(|| image.cwd.clone());
        Ok(ProcessSpec {
            root: Some(ROOT.to_owned()),
            args,
            env: self.environment(image, matches!(stdio, StdioSpec::Terminal(_))),
            cwd: if cwd.is_empty() { "/".to_owned() } else { cwd },
            user: User::Named(self.user.clone().unwrap_or_else(|| image.user.clone())),
            stdio,
            pid_namespace: PidNamespace::New,
            oom_score_adj: 0,
            confinement: Default::default(),
        })
    }

    /// Program and arguments.
    pub(super) fn program(&self, image: &ImageConfig) -> Result<Vec<String>, Failure> {
        let args: Vec<String> = match &self.entrypoint {
            Some(program) => std::iter::once(program).chain(&self.command).cloned().collect(),
            None if self.command.is_empty() => image.entrypoint.iter().chain(&image.cmd).cloned().collect(),
            None => image.entrypoint.iter().chain(&self.command).cloned().collect(),
        };
        if args.is_empty() {
            return Err(Failure::new("the image names no command").help("give one: mvm run IMAGE -- CMD"));
        }
        Ok(args)
    }

    /// The image's variables, then the user's, the last of a name wins; with the few that programs expect.
    pub(super) fn environment(&self, image: &ImageConfig, terminal: bool) -> Vec<String> {
        let expected = [DEFAULT_PATH].into_iter().chain(terminal.then_some("TERM=xterm"));
        let given = image.env.iter().chain(&self.env).map(String::as_str);
        let all: Vec<_> = expected.chain(given).collect();
        // From the last to the first: an image may have hundreds of thousands, so none is searched for.
        let mut names = HashSet::new();
        let mut env: Vec<_> =
            all.into_iter().rev().filter(|text| names.insert(text.split('=').next())).collect();
        env.reverse();
        env.into_iter().map(str::to_owned).collect()
    }
}

/// What a failed start means to whoever asked for it.
pub(crate) fn start_failure(program: &str, error: AgentError) -> Failure {
    let what = format!("cannot run {program} in the container");
    if let (Some(exit_code), AgentError::Refused { errno, .. }) = (error.exec_exit_code(), &error) {
        let message = std::io::Error::from_raw_os_error(*errno).to_string();
        let failure = Failure::because(what, NotRunnable { message, exit_code });
        return if *errno == libc::ENOENT {
            failure.help("the image has no such program: name it with its path, or another")
        } else {
            failure
        };
    }
    Failure::because(what, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> ImageConfig {
        ImageConfig {
            entrypoint: vec!["/entry".into()],
            cmd: vec!["default".into()],
            env: vec!["A=1".into(), "PATH=/x".into()],
            cwd: "/work".into(),
            user: "app".into(),
            ..Default::default()
        }
    }

    const STDIO: StdioSpec = StdioSpec::Pipes { stdin: false, stdout: true, stderr: true };

    #[test]
    fn without_overrides_the_image_decides() {
        let spec = Overrides::default().process(&image(), STDIO).unwrap();
        assert_eq!(spec.args, ["/entry", "default"]);
        assert_eq!(spec.env, ["A=1", "PATH=/x"]);
        assert_eq!((spec.cwd.as_str(), spec.user), ("/work", User::Named("app".into())));
    }

    #[test]
    fn a_command_replaces_the_images_command_and_an_entry_point_both() {
        let command = Overrides { command: vec!["mine".into()], ..Default::default() };
        assert_eq!(command.process(&image(), STDIO).unwrap().args, ["/entry", "mine"]);
        let entry = Overrides { entrypoint: Some("/bin/sh".into()), ..Default::default() };
        assert_eq!(entry.process(&image(), STDIO).unwrap().args, ["/bin/sh"]);
    }

    #[test]
    fn the_users_variables_win_and_an_image_without_path_gets_one() {
        let overrides = Overrides { env: vec!["A=2".into(), "B=".into()], ..Default::default() };
        assert_eq!(overrides.process(&image(), STDIO).unwrap().env, ["PATH=/x", "A=2", "B="]);
        let bare = ImageConfig { cmd: vec!["x".into()], ..Default::default() };
        let spec = Overrides::default().process(&bare, STDIO).unwrap();
        assert_eq!(spec.env, [DEFAULT_PATH]);
        assert_eq!(spec.cwd, "/");
    }

    #[test]
    fn an_image_with_as_many_variables_as_fit_does_not_keep_anybody_waiting() {
        let env: Vec<String> = (0..500_000).map(|n| format!("{n:x}")).collect();
        let image = ImageConfig { cmd: vec!["x".into()], env: env.clone(), ..Default::default() };
        let begun = std::time::Instant::now();
        let spec = Overrides::default().process(&image, STDIO).unwrap();
        assert_eq!((spec.env.len(), spec.env.last()), (env.len() + 1, env.last()));
        assert!(begun.elapsed() < std::time::Duration::from_secs(10), "{:?}", begun.elapsed());
    }

    #[test]
    fn an_image_without_a_command_is_an_error_with_a_remedy() {
        let failure = Overrides::default().process(&ImageConfig::default(), STDIO).unwrap_err();
        assert!(failure.report().contains("mvm run IMAGE -- CMD"));
    }
}
