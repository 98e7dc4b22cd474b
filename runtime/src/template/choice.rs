//! Whether a machine boots or goes on from a template, and what becomes of one that is of no use.

use std::fmt;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::str::FromStr;

use super::make::make_in_background;
use super::recipe::{Key, Recipe};
use super::store::{Template, Templates};
use crate::failure::{Context, Failure};

/// Says what is chosen where nobody says otherwise.
pub const VARIABLE: &str = "MVM_TEMPLATE";

/// Whether machines are made of templates.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Choice {
    /// Of one that is there; else the machine boots, and a template is made meanwhile.
    #[default]
    Auto,
    /// No: they boot.
    Never,
    /// Of one that is made first if it is missing; that there is none of use is an error.
    Always,
}

/// Text that is no choice.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} does not say whether to use a template: auto, never or always")]
pub struct NotAChoice(String);

impl FromStr for Choice {
    type Err = NotAChoice;

    fn from_str(text: &str) -> Result<Self, NotAChoice> {
        match text {
            "auto" => Ok(Self::Auto),
            "never" => Ok(Self::Never),
            "always" => Ok(Self::Always),
            _ => Err(NotAChoice(text.to_owned())),
        }
    }
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::Never => "never",
            Self::Always => "always",
        })
    }
}

impl Choice {
    /// What [`VARIABLE`] says; what cannot be understood is logged and passed over.
    pub fn of_environment() -> Self {
        let Some(text) = std::env::var_os(VARIABLE) else { return Self::default() };
        text.to_string_lossy().parse().unwrap_or_else(|error| {
            log::warn!("{VARIABLE} is passed over: {error}");
            Self::default()
        })
    }
}

/// Who makes a template that is missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Maker {
    /// A thread of this process, which is to live for a while.
    #[default]
    Thread,
    /// The `mvm` at this path, as a process of its own that outlives this one.
    Program(PathBuf),
}

/// Where machines come from.
#[derive(Clone, Debug)]
pub struct Source {
    /// Whether of templates.
    pub choice: Choice,
    /// Of which.
    pub templates: Templates,
    /// Who makes one that is missing.
    pub maker: Maker,
}

/// The ways to a machine.
pub trait Ways {
    /// What comes of them.
    type Machine;

    /// It boots.
    ///
    /// # Errors
    /// It does not.
    fn boot(&mut self) -> Result<Self::Machine, Failure>;

    /// It goes on from a template, up to the point where the agent has called.
    ///
    /// # Errors
    /// It does not.
    fn go_on(&mut self, template: &Template) -> Result<Self::Machine, Failure>;

    /// Makes the template now.
    ///
    /// # Errors
    /// It cannot be made.
    fn make(&mut self) -> Result<Template, Failure>;

    /// Has the template made some time.
    fn make_later(&mut self);
}

impl Source {
    /// A machine of the template of `key`, or one that booted. A template is set aside if a machine boots and none
    /// could be made of it.
    ///
    /// # Errors
    /// What became of the last way that was tried.
    pub fn begin<W: Ways>(&self, key: &Key, ways: &mut W) -> Result<W::Machine, Failure> {
        let there = self.templates.find(key);
        match (self.choice, there) {
            (Choice::Never, _) => ways.boot(),
            (Choice::Always, there) => {
                let template = there.map_or_else(|| ways.make(), Ok)?;
                go_on(ways, &template)
            }
            (Choice::Auto, Some(template)) => go_on(ways, &template).or_else(|failure| {
                let machine = ways.boot()?;
                // It is the template, then, and not the host.
                log::warn!("template {} is set aside: {}", key.short(), failure.report());
                if let Err(failure) = self.templates.set_aside(key, &failure.report()) {
                    log::warn!("{}", failure.report());
                }
                Ok(machine)
            }),
            (Choice::Auto, None) => {
                let machine = ways.boot()?;
                if !self.templates.is_aside(key) {
                    ways.make_later();
                }
                Ok(machine)
            }
        }
    }

    /// Has a template made while this process goes on.
    pub fn make_later(&self, recipe: &Recipe) {
        match &self.maker {
            Maker::Thread => make_in_background(&self.templates, recipe),
            Maker::Program(program) => {
                let spawned = Command::new(program)
                    .args(["template", "create", "--background"])
                    .arg(format!("--cpus={}", recipe.cpus.get()))
                    .arg(format!("--memory={}M", recipe.memory.mib()))
                    .stdin(Stdio::null())
                    .stdout(Stdio::null())
                    .stderr(Stdio::null())
                    .spawn();
                if let Err(error) = spawned {
                    log::warn!("no template is made: cannot start {}: {error}", program.display());
                }
            }
        }
    }
}

fn go_on<W: Ways>(ways: &mut W, template: &Template) -> Result<W::Machine, Failure> {
    let machine = ways
        .go_on(template)
        .context(|| format!("cannot make a machine of template {}", template.manifest.key.short()))?;
    template.touch();
    Ok(machine)
}

#[cfg(test)]
mod tests {
    use super::super::store::tests::Cache;
    use super::*;

    /// Notes which ways were gone; some of them lead nowhere.
    struct Notebook<'a> {
        cache: &'a Cache,
        blocked: &'static [&'static str],
        gone: Vec<&'static str>,
    }

    impl Notebook<'_> {
        fn go(&mut self, way: &'static str) -> Result<&'static str, Failure> {
            self.gone.push(way);
            if self.blocked.contains(&way) { Err(Failure::new(format!("{way} is blocked"))) } else { Ok(way) }
        }
    }

    impl Ways for Notebook<'_> {
        type Machine = &'static str;

        fn boot(&mut self) -> Result<&'static str, Failure> {
            self.go("boot")
        }

        fn go_on(&mut self, _: &Template) -> Result<&'static str, Failure> {
            self.go("go on")
        }

        fn make(&mut self) -> Result<Template, Failure> {
            self.go("make").map(|_| self.cache.add(128, 10))
        }

        fn make_later(&mut self) {
            self.gone.push("make later");
        }
    }

    /// The ways that are gone, and whether that led to a machine.
    fn ways(cache: &Cache, choice: Choice, blocked: &'static [&'static str]) -> (Vec<&'static str>, bool) {
        let source = Source { choice, templates: cache.templates.clone(), maker: Maker::Thread };
        let mut ways = Notebook { cache, blocked, gone: Vec::new() };
        let came = source.begin(&cache.key(128), &mut ways).is_ok();
        (ways.gone, came)
    }

    #[test]
    fn a_machine_is_made_of_the_template_that_is_there_unless_nobody_wants_that() {
        let cache = Cache::new();
        cache.add(128, 10);
        assert_eq!(ways(&cache, Choice::Auto, &[]), (vec!["go on"], true));
        assert_eq!(ways(&cache, Choice::Always, &[]), (vec!["go on"], true));
        assert_eq!(ways(&cache, Choice::Never, &[]), (vec!["boot"], true));
    }

    #[test]
    fn a_template_that_is_missing_is_made_meanwhile_or_first() {
        let cache = Cache::new();
        assert_eq!(ways(&cache, Choice::Never, &[]), (vec!["boot"], true));
        assert_eq!(ways(&cache, Choice::Auto, &[]), (vec!["boot", "make later"], true));
        assert_eq!(ways(&cache, Choice::Auto, &["boot"]), (vec!["boot"], false));
        assert_eq!(ways(&cache, Choice::Always, &["make"]), (vec!["make"], false));
        assert_eq!(ways(&cache, Choice::Always, &[]), (vec!["make", "go on"], true));
    }

    #[test]
    fn a_template_that_is_of_no_use_is_tried_once_and_not_made_again_at_once() {
        let cache = Cache::new();
        cache.add(128, 10);
        assert_eq!(ways(&cache, Choice::Auto, &["go on"]), (vec!["go on", "boot"], true));
        assert_eq!(ways(&cache, Choice::Auto, &[]), (vec!["boot"], true));
        let entry = cache.templates.get(cache.key(128).as_str()).unwrap();
        let super::super::Condition::Aside { reason } = entry.condition else { panic!("{entry:?}") };
        assert!(reason.contains("go on is blocked"), "{reason}");
    }

    #[test]
    fn a_host_on_which_nothing_runs_does_not_discredit_a_template() {
        let cache = Cache::new();
        cache.add(128, 10);
        assert_eq!(ways(&cache, Choice::Auto, &["go on", "boot"]), (vec!["go on", "boot"], false));
        assert_eq!(ways(&cache, Choice::Always, &["go on"]), (vec!["go on"], false));
        assert_eq!(ways(&cache, Choice::Auto, &[]), (vec!["go on"], true));
    }

    #[test]
    fn choices_are_words_and_nothing_else() {
        for choice in [Choice::Auto, Choice::Never, Choice::Always] {
            assert_eq!(choice.to_string().parse(), Ok(choice));
        }
        assert!("yes".parse::<Choice>().is_err());
    }
}
