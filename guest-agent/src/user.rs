//! Who a process runs as: `user[:group]` looked up in the root's own `/etc/passwd` and `/etc/group`.
//!
//! The files are the image's, so they are untrusted: opened below the root whatever their links say,
//! never waited for, and read up to a bound.

use std::{
    fs::File,
    io::Read,
    os::fd::{BorrowedFd, OwnedFd},
};

use mvm_protocol::{User, limits::MAX_USER_DATABASE};
use nix::{
    fcntl::{OFlag, OpenHow, ResolveFlag, openat2},
    sys::stat::{SFlag, fstat},
    unistd::{Gid, Uid},
};

use crate::error::{Error, Result};

/// The numbers behind a user.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Account {
    pub(crate) uid: Uid,
    pub(crate) gid: Gid,
    pub(crate) groups: Vec<Gid>,
    /// The home directory, when the user is known.
    pub(crate) home: Option<String>,
}

/// Looks a user up in the root directory.
pub(crate) fn resolve(user: &User, root: BorrowedFd<'_>) -> Result<Account> {
    match user {
        User::Ids { uid, gid, groups } => {
            let home = find_user(&read_database(root, "etc/passwd"), &uid.to_string()).map(|it| it.home);
            let groups = groups.iter().copied().map(Gid::from_raw).collect();
            Ok(Account { uid: Uid::from_raw(*uid), gid: Gid::from_raw(*gid), groups, home })
        }
        User::Named(name) => {
            let passwd = read_database(root, "etc/passwd");
            let group = read_database(root, "etc/group");
            by_name(name, &passwd, &group)
        }
    }
}

/// Opens a path below a root directory as a process in that root would see it.
pub(crate) fn open_in_root(root: BorrowedFd<'_>, path: &str, flags: OFlag) -> nix::Result<OwnedFd> {
    let how = OpenHow::new()
        .flags(flags | OFlag::O_CLOEXEC)
        .resolve(ResolveFlag::RESOLVE_IN_ROOT | ResolveFlag::RESOLVE_NO_MAGICLINKS);
    openat2(root, path, how)
}

/// A file's text; empty if it is missing, too long, or no regular file.
fn read_database(root: BorrowedFd<'_>, path: &str) -> String {
    let Ok(fd) = open_in_root(root, path, OFlag::O_RDONLY | OFlag::O_NONBLOCK) else {
        return String::new();
    };
    let regular = fstat(&fd).is_ok_and(|stat| stat.st_mode & SFlag::S_IFMT.bits() == SFlag::S_IFREG.bits());
    let mut bytes = Vec::new();
    let most = MAX_USER_DATABASE as u64;
    if !regular || File::from(fd).take(most + 1).read_to_end(&mut bytes).is_err() {
        return String::new();
    }
    if bytes.len() > MAX_USER_DATABASE {
        return String::new();
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// A line of `/etc/passwd`.
struct Entry<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
    home: String,
}

fn find_user<'a>(passwd: &'a str, user: &str) -> Option<Entry<'a>> {
    let entries = || {
        passwd.lines().filter_map(|line| {
            let mut fields = line.trim().split(':');
            let name = fields.next().filter(|name| !name.is_empty())?;
            let uid = fields.nth(1)?.parse().ok()?;
            let gid = fields.next()?.parse().ok()?;
            Some(Entry { name, uid, gid, home: fields.nth(1).unwrap_or_default().to_owned() })
        })
    };
    entries().find(|entry| entry.name == user).or_else(|| {
        let uid: u32 = user.parse().ok()?;
        entries().find(|entry| entry.uid == uid)
    })
}

/// A line of `/etc/group`: name, number, members.
fn groups(group: &str) -> impl Iterator<Item = (&str, u32, &str)> {
    group.lines().filter_map(|line| {
        let mut fields = line.trim().split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = fields.nth(1)?.parse().ok()?;
        Some((name, gid, fields.next().unwrap_or_default()))
    })
}

fn by_name(user: &str, passwd: &str, group: &str) -> Result<Account> {
    let (user, group_name) = user.split_once(':').unwrap_or((user, ""));
    let user = if user.is_empty() { "0" } else { user };
    let entry = find_user(passwd, user);
    let uid = match (&entry, user.parse()) {
        (Some(entry), _) => entry.uid,
        (None, Ok(uid)) => uid,
        (None, Err(_)) => return Err(Error::Invalid(format!("no user {user} in /etc/passwd of the root"))),
    };
    let gid = match group_name {
        "" => entry.as_ref().map_or(0, |entry| entry.gid),
        name => find_group(name, group)?,
    };
    // Membership only counts where the image did not choose a group itself.
    let member = entry.as_ref().filter(|_| group_name.is_empty()).map(|entry| entry.name);
    let extra = groups(group)
        .filter(|(_, _, members)| member.is_some_and(|name| members.split(',').any(|it| it == name)))
        .map(|(_, gid, _)| Gid::from_raw(gid))
        .collect();
    let home = entry.map(|entry| entry.home);
    Ok(Account { uid: Uid::from_raw(uid), gid: Gid::from_raw(gid), groups: extra, home })
}

fn find_group(name: &str, group: &str) -> Result<u32> {
    if let Some((_, gid, _)) = groups(group).find(|(it, ..)| *it == name) {
        return Ok(gid);
    }
    name.parse().map_err(|_| Error::Invalid(format!("no group {name} in /etc/group of the root")))
}

#[cfg(test)]
mod tests {
    use std::{fs, os::fd::AsFd, os::unix::fs::symlink};

    use super::*;

    const PASSWD: &str =
        "root:x:0:0:root:/root:/bin/sh\nweb:x:33:44:www:/var/www:/bin/false\nbroken\n:x:1:1\n";
    const GROUP: &str = "root:x:0:\nweb:x:44:\nlogs:x:50:syslog,web\nmedia:x:60:web\n";

    fn ids(account: &Account) -> (u32, u32, Vec<u32>) {
        let groups = account.groups.iter().map(|gid| gid.as_raw()).collect();
        (account.uid.as_raw(), account.gid.as_raw(), groups)
    }

    #[test]
    fn a_name_gives_user_group_memberships_and_home() {
        let account = by_name("web", PASSWD, GROUP).unwrap();
        assert_eq!(ids(&account), (33, 44, vec![50, 60]));
        assert_eq!(account.home.as_deref(), Some("/var/www"));
    }

    #[test]
    fn a_number_that_is_listed_is_that_user() {
        assert_eq!(ids(&by_name("33", PASSWD, GROUP).unwrap()), (33, 44, vec![50, 60]));
    }

    #[test]
    fn a_number_that_is_not_listed_is_taken_as_it_is_with_group_zero() {
        let account = by_name("1234", PASSWD, GROUP).unwrap();
        assert_eq!(ids(&account), (1234, 0, vec![]));
        assert_eq!(account.home, None);
    }

    #[test]
    fn a_group_that_is_named_replaces_the_memberships() {
        assert_eq!(ids(&by_name("web:logs", PASSWD, GROUP).unwrap()), (33, 50, vec![]));
        assert_eq!(ids(&by_name("web:77", PASSWD, GROUP).unwrap()), (33, 77, vec![]));
        assert_eq!(ids(&by_name(":logs", PASSWD, GROUP).unwrap()), (0, 50, vec![]));
    }

    #[test]
    fn nobody_named_is_root() {
        assert_eq!(ids(&by_name("", "", "").unwrap()), (0, 0, vec![]));
    }

    #[test]
    fn an_unknown_name_is_an_error_that_says_which() {
        let error = by_name("nope", PASSWD, GROUP).unwrap_err();
        assert_eq!(error.to_string(), "no user nope in /etc/passwd of the root");
        let error = by_name("web:nope", PASSWD, GROUP).unwrap_err();
        assert_eq!(error.to_string(), "no group nope in /etc/group of the root");
    }

    #[test]
    fn a_database_that_links_out_of_the_root_is_looked_for_in_the_root() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc")).unwrap();
        symlink("/../../shadow/passwd", root.path().join("etc/passwd")).unwrap();
        let dir = File::open(root.path()).unwrap();
        assert_eq!(read_database(dir.as_fd(), "etc/passwd"), "");
        fs::create_dir_all(root.path().join("shadow")).unwrap();
        fs::write(root.path().join("shadow/passwd"), "inside").unwrap();
        assert_eq!(read_database(dir.as_fd(), "etc/passwd"), "inside");
    }

    #[test]
    fn a_database_that_is_huge_or_a_pipe_is_as_good_as_none() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir_all(root.path().join("etc")).unwrap();
        let dir = File::open(root.path()).unwrap();
        let passwd = File::create(root.path().join("etc/passwd")).unwrap();
        passwd.set_len(1 << 30).unwrap();
        assert_eq!(read_database(dir.as_fd(), "etc/passwd"), "");
        nix::unistd::mkfifo(&root.path().join("etc/group"), nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert_eq!(read_database(dir.as_fd(), "etc/group"), "");
    }
}
