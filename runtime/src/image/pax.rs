//! Extended headers (POSIX `pax`): `length key=value` lines that override the fixed fields.

use super::error::{Error, Result, printable};
use super::limits::{MAX_PATH_BYTES, MAX_XATTR_BYTES, MAX_XATTRS};
use super::sparse::PaxSparse;
use super::tarball::bad;
use crate::erofs::{Mtime, Xattrs};

/// Extended attributes, as GNU tar, bsdtar and Go spell them.
const XATTR: &[u8] = b"SCHILY.xattr.";
/// Overlay file systems keep notes about their layers here. They mean nothing once layers are
/// merged, and a guest's overlay must not take orders from an image.
const OVERLAY_NOTES: &[u8] = b"trusted.overlay.";

/// What extension entries say about the entry that follows them.
#[derive(Debug, Default)]
pub(super) struct Extensions {
    pub(super) path: Option<Vec<u8>>,
    pub(super) link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) uid: Option<u64>,
    pub(super) gid: Option<u64>,
    pub(super) mtime: Option<Mtime>,
    pub(super) xattrs: Xattrs,
    pub(super) sparse: PaxSparse,
}

impl Extensions {
    /// Takes in the body of one extended header.
    pub(super) fn parse(&mut self, mut bytes: &[u8]) -> Result<()> {
        // Some writers pad with zero bytes.
        while !bytes.is_empty() && bytes.iter().any(|byte| *byte != 0) {
            let (key, value, rest) =
                record(bytes).ok_or_else(|| bad("its extended header makes no sense"))?;
            self.set(key, value)?;
            bytes = rest;
        }
        Ok(())
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<()> {
        let broken = || bad(&format!("{}={} in its extended header", printable(key), printable(value)));
        let number = || parse_number(value).ok_or_else(broken);
        match key {
            b"path" => self.path = Some(path(value)?),
            b"linkpath" => self.link = Some(path(value)?),
            b"size" => self.size = Some(number()?),
            b"uid" => self.uid = Some(number()?),
            b"gid" => self.gid = Some(number()?),
            b"mtime" => self.mtime = Some(parse_time(value).ok_or_else(broken)?),
            _ => match key.strip_prefix(XATTR) {
                Some(name) => return self.set_xattr(name, value),
                None => return self.sparse.set(key, value),
            },
        }
        Ok(())
    }

    fn set_xattr(&mut self, name: &[u8], value: &[u8]) -> Result<()> {
        if self.xattrs.bytes() + name.len() + value.len() > MAX_XATTR_BYTES {
            return Err(Error::Limit {
                what: "bytes of extended attributes of a file",
                limit: MAX_XATTR_BYTES as u64,
            });
        }
        if self.xattrs.len() >= MAX_XATTRS {
            return Err(Error::Limit { what: "extended attributes of a file", limit: MAX_XATTRS as u64 });
        }
        if !name.starts_with(OVERLAY_NOTES) && !self.xattrs.set(name, value) {
            log::debug!("extended attribute {} cannot be kept", printable(name));
        }
        Ok(())
    }
}

fn path(value: &[u8]) -> Result<Vec<u8>> {
    if value.len() > MAX_PATH_BYTES {
        return Err(Error::Limit { what: "bytes of a path", limit: MAX_PATH_BYTES as u64 });
    }
    Ok(value.to_vec())
}

/// One line: key, value, what follows. The length counts the whole line, so that values may hold
/// any byte.
fn record(bytes: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let blank = bytes.iter().position(|byte| *byte == b' ')?;
    let len = usize::try_from(parse_number(bytes.get(..blank)?)?).ok()?;
    let line = bytes.get(blank + 1..len)?.strip_suffix(b"\n")?;
    let equals = line.iter().position(|byte| *byte == b'=')?;
    Some((line.get(..equals)?, line.get(equals + 1..)?, bytes.get(len..)?))
}

/// Decimal digits and nothing else.
pub(super) fn parse_number(text: &[u8]) -> Option<u64> {
    if !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Seconds with an optional fraction, maybe negative.
fn parse_time(text: &[u8]) -> Option<Mtime> {
    let text = std::str::from_utf8(text).ok()?;
    let (whole, fraction) = text.split_once('.').unwrap_or((text, ""));
    let negative = whole.starts_with('-');
    let seconds: i64 = whole.parse().ok()?;
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let digits: String = fraction.chars().chain("000000000".chars()).take(9).collect();
    let nanoseconds: u32 = digits.parse().ok()?;
    if negative && nanoseconds > 0 {
        return Some(Mtime { seconds: seconds.checked_sub(1)?, nanoseconds: 1_000_000_000 - nanoseconds });
    }
    Some(Mtime { seconds, nanoseconds })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(bytes: &[u8]) -> Result<Extensions> {
        let mut extensions = Extensions::default();
        extensions.parse(bytes)?;
        Ok(extensions)
    }

    #[test]
    fn values_may_hold_newlines_and_equals_signs() {
        let extensions = parse(b"12 path=a=b\n30 SCHILY.xattr.user.x=\n1\n2=3\n\0\0").unwrap();
        assert_eq!(extensions.path.unwrap(), b"a=b");
        assert_eq!(extensions.xattrs.iter().collect::<Vec<_>>(), [(&b"user.x"[..], &b"\n1\n2=3"[..])]);
    }

    #[test]
    fn times_have_fractions_and_signs() {
        let time = |seconds, nanoseconds| Some(Mtime { seconds, nanoseconds });
        assert_eq!(parse_time(b"12"), time(12, 0));
        assert_eq!(parse_time(b"12.5"), time(12, 500_000_000));
        assert_eq!(parse_time(b"12.1234567899"), time(12, 123_456_789));
        assert_eq!(parse_time(b"-1.25"), time(-2, 750_000_000));
        assert_eq!(parse_time(b"-0.5"), time(-1, 500_000_000));
        assert_eq!(parse_time(b"1e5"), None);
        assert_eq!(parse_time(b"1.-5"), None);
    }

    #[test]
    fn lines_that_lie_about_their_length_are_refused() {
        for bad in
            [&b"5 path=a\n"[..], b"99 path=a\n", b"0 path=a\n", b"path=a\n", b"+9 path=a\n", b"9 path:a\n"]
        {
            assert!(parse(bad).is_err(), "{}", bad.escape_ascii());
        }
    }

    #[test]
    fn attributes_beyond_the_limit_are_refused() {
        let value = "v".repeat(65_000);
        let line = |name: &str| {
            let body = format!(" SCHILY.xattr.user.{name}={value}\n");
            format!("{}{body}", body.len() + 5)
        };
        assert!(parse(line("a").as_bytes()).is_ok());
        let error = parse((line("a") + &line("b")).as_bytes()).unwrap_err();
        assert!(matches!(error, Error::Limit { .. }), "{error}");
    }

    #[test]
    fn a_hundred_thousand_attributes_are_refused_by_the_limit_once_it_is_reached() {
        let mut extensions = Extensions::default();
        let lines: Vec<u8> = (0..100_000)
            .flat_map(|n| {
                let body = format!(" SCHILY.xattr.user.{n:06}=\n");
                format!("{}{body}", body.len() + 2).into_bytes()
            })
            .collect();
        let error = extensions.parse(&lines).unwrap_err();
        assert_eq!(error.to_string(), "extended attributes of a file: more than the limit of 1024");
        // None of the rest was looked at.
        assert_eq!(extensions.xattrs.len(), MAX_XATTRS);
    }

    #[test]
    fn notes_of_an_overlay_are_dropped() {
        assert!(parse(b"41 SCHILY.xattr.trusted.overlay.opaque=y\n").unwrap().xattrs.is_empty());
    }
}
