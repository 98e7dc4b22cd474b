//! `mvm template`: the machines that others go on from.

pub(crate) mod args;

use std::io::IsTerminal;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use indicatif::ProgressBar;
use mvm_runtime::container::state_dir;
use mvm_runtime::failure::{Context, Failure};
use mvm_runtime::template::{self, Condition, Entry, Keep, Phase, Recipe, Templates};

use self::args::{Create, Inspect, Prune, Rm, Template};
use crate::life::{SOME_FAILED, json, print};
use crate::table::{ago, bytes, table};
use crate::words::{Format, Keys};
use crate::{complain, say};

/// How often a terminal shows that something is done.
const TICK: Duration = Duration::from_millis(100);

/// Does what one of the commands says; its exit code.
pub(crate) fn template(command: Template) -> Result<u8, Failure> {
    let state = state_dir();
    let templates = Templates::of(&state);
    match command {
        Template::Create(options) => {
            let recipe = Recipe::new(&state, options.shape.cpus, options.shape.memory)?;
            create(&templates, &recipe, &options)
        }
        Template::Ls(options) => ls(&templates, &options),
        Template::Inspect(options) => inspect(&templates, &options),
        Template::Rm(options) => rm(&templates, &options),
        Template::Prune(options) => prune(&templates, &options),
    }
}

fn create(templates: &Templates, recipe: &Recipe, options: &Create) -> Result<u8, Failure> {
    if options.background {
        // Whoever started us may end, and with it what ends with its terminal.
        nix::unistd::setsid().context(|| "cannot leave the session".to_owned())?;
        return template::make_when_idle(templates, recipe).map(|()| 0);
    }
    let mut progress = Progress { quiet: options.quiet, ..Progress::default() };
    let made = template::make(templates, recipe, options.force, &mut |phase| progress.show(phase));
    let worked = progress.end();
    let entry = templates.get(made?.manifest.key.as_str())?;
    if options.quiet {
        print(&format!("{}\n", entry.key))?;
    } else if options.format == Format::Json {
        print(&json(&entry)?)?;
    } else {
        let verb = if worked { "made" } else { "is there already" };
        print(&format!("{} {verb}, {}\n", entry.key.short(), bytes(entry.disk_bytes)))?;
    }
    Ok(0)
}

/// What is being done, on a terminal in one line that goes away.
#[derive(Default)]
struct Progress {
    quiet: bool,
    bar: Option<ProgressBar>,
    worked: bool,
}

impl Progress {
    fn show(&mut self, phase: Phase) {
        let what = match phase {
            Phase::Waiting => "waiting for another mvm that makes or removes templates",
            Phase::Booting => "booting a machine",
            Phase::Saving => "saving it",
            Phase::Trying => "having a machine of it run",
            Phase::Digesting => "digesting what it was made of",
        };
        self.worked |= phase != Phase::Waiting;
        if self.quiet {
            return;
        }
        if !std::io::stderr().is_terminal() {
            return say(&format!("mvm: {what}"));
        }
        let bar = self.bar.get_or_insert_with(ProgressBar::new_spinner);
        bar.enable_steady_tick(TICK);
        bar.set_message(what);
    }

    /// Whether anything was done.
    fn end(self) -> bool {
        if let Some(bar) = self.bar {
            bar.finish_and_clear();
        }
        self.worked
    }
}

fn ls(templates: &Templates, options: &Keys) -> Result<u8, Failure> {
    let list = templates.list()?;
    if options.quiet {
        print(&list.iter().map(|entry| format!("{}\n", entry.key)).collect::<String>())?;
    } else if options.format == Format::Json {
        print(&json(&list)?)?;
    } else {
        print(&listed(&list))?;
    }
    Ok(0)
}

/// A list for people.
fn listed(list: &[Entry]) -> String {
    let since = |time: SystemTime| ago(time.elapsed().unwrap_or_default().as_secs());
    let row = |entry: &Entry| {
        let of = |text: &dyn Fn(&template::Manifest) -> String| {
            entry.manifest.as_ref().map_or_else(|| "-".to_owned(), text)
        };
        vec![
            entry.key.short().to_owned(),
            of(&|it| it.cpus.to_string()),
            of(&|it| bytes(it.memory_mib.saturating_mul(1 << 20))),
            // It is the guest's word.
            of(&|it| it.kernel_release.replace(char::is_control, "?")),
            bytes(entry.disk_bytes),
            condition(&entry.condition).to_owned(),
            of(&|it| since(UNIX_EPOCH + Duration::from_secs(it.created))),
            since(entry.last_used),
        ]
    };
    let head = ["KEY", "CPUS", "MEMORY", "KERNEL", "SIZE", "CONDITION", "CREATED", "USED"];
    table(&head, &list.iter().map(row).collect::<Vec<_>>())
}

fn condition(condition: &Condition) -> &'static str {
    match condition {
        Condition::Ready => "ready",
        Condition::Outdated => "outdated",
        Condition::Aside { .. } => "set aside",
    }
}

fn inspect(templates: &Templates, options: &Inspect) -> Result<u8, Failure> {
    let (mut found, mut code) = (Vec::new(), 0);
    for beginning in &options.templates {
        match templates.get(beginning) {
            Ok(entry) => found.push(entry),
            Err(failure) => {
                complain(&failure);
                code = SOME_FAILED;
            }
        }
    }
    match options.format {
        Format::Json => print(&json(&found)?)?,
        Format::Text => print(&found.iter().map(described).collect::<Vec<_>>().join("\n"))?,
    }
    Ok(code)
}

/// A template for people, one fact a line.
fn described(entry: &Entry) -> String {
    let mut facts =
        vec![("key", entry.key.to_string()), ("condition", condition(&entry.condition).to_owned())];
    if let Condition::Aside { reason } = &entry.condition {
        facts.push(("because", reason.lines().map(str::trim).collect::<Vec<_>>().join("; ")));
    }
    if let Some(it) = &entry.manifest {
        let file = |it: &template::Ingredient| format!("{} sha256:{}", it.path.display(), it.sha256);
        facts.extend([
            ("CPUs", it.cpus.to_string()),
            ("memory", bytes(it.memory_mib.saturating_mul(1 << 20))),
            ("saved", format!("{} memory, {} state", bytes(it.memory_bytes), bytes(it.state_bytes))),
            ("kernel", file(&it.kernel)),
            ("agent", file(&it.agent)),
            ("VMM", file(&it.vmm)),
            ("command line", it.cmdline.clone()),
            ("processor", it.processor.clone()),
            ("made in", format!("{} ms", it.took_ms)),
        ]);
    }
    let line =
        |(name, value): &(&str, String)| format!("{name:<12}  {}\n", value.replace(char::is_control, "?"));
    facts.iter().map(line).collect()
}

fn rm(templates: &Templates, options: &Rm) -> Result<u8, Failure> {
    let mut code = 0;
    for beginning in &options.templates {
        match templates.remove(beginning) {
            Ok(entry) => print(&format!("{} removed, {}\n", entry.key.short(), bytes(entry.disk_bytes)))?,
            Err(failure) => {
                complain(&failure);
                code = SOME_FAILED;
            }
        }
    }
    Ok(code)
}

fn prune(templates: &Templates, options: &Prune) -> Result<u8, Failure> {
    let keep = Keep { nothing: options.all, bytes: options.max_size, unused: options.unused_for };
    let pruned = templates.prune(&keep)?;
    if options.format == Format::Json {
        return print(&json(&pruned)?).map(|()| 0);
    }
    for entry in &pruned.removed {
        let what = condition(&entry.condition);
        print(&format!("{} {what} {}\n", entry.key.short(), bytes(entry.disk_bytes)))?;
    }
    say(&format!("freed {}", bytes(pruned.freed_bytes)));
    Ok(0)
}
