//! Lists for people: columns as wide as they need to be.

use mvm_runtime::failure::escaped;

/// Lays `rows` out below `head`. The last column is not padded; a terminal obeys nothing that is in them.
pub(crate) fn table(head: &[&str], rows: &[Vec<String>]) -> String {
    let rows: Vec<Vec<String>> =
        rows.iter().map(|row| row.iter().map(|text| escaped(text)).collect()).collect();
    let mut widths: Vec<usize> = head.iter().map(|text| text.chars().count()).collect();
    for row in &rows {
        for (width, text) in widths.iter_mut().zip(row) {
            *width = (*width).max(text.chars().count());
        }
    }
    let line = |texts: &mut dyn Iterator<Item = &str>| -> String {
        let cells: Vec<_> = texts.zip(&widths).map(|(text, width)| format!("{text:width$}")).collect();
        cells.join("  ").trim_end().to_owned() + "\n"
    };
    let mut text = line(&mut head.iter().copied());
    for row in rows {
        text.push_str(&line(&mut row.iter().map(String::as_str)));
    }
    text
}

/// A number of bytes as people read it: `512 KiB`, `1.5 GiB`.
pub(crate) fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut unit = 0;
    let mut divisor = 1_u64;
    while unit + 1 < UNITS.len() && count / divisor >= 1024 {
        divisor *= 1024;
        unit += 1;
    }
    let name = UNITS.get(unit).copied().unwrap_or_default();
    let (whole, tenths) = (count / divisor, count % divisor * 10 / divisor);
    if unit == 0 || whole >= 10 || tenths == 0 {
        format!("{whole} {name}")
    } else {
        format!("{whole}.{tenths} {name}")
    }
}

/// A time that has passed, as people say it: `5 seconds`, `3 hours`.
pub(crate) fn ago(seconds: u64) -> String {
    let (count, unit) = match seconds {
        0..120 => (seconds, "second"),
        120..7200 => (seconds / 60, "minute"),
        7200..172_800 => (seconds / 3600, "hour"),
        _ => (seconds / 86400, "day"),
    };
    format!("{count} {unit}{} ago", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_text() {
        let rows = [vec!["a".to_owned(), "bcd".to_owned()], vec!["long".to_owned(), "x".to_owned()]];
        assert_eq!(table(&["ID", "NAME"], &rows), "ID    NAME\na     bcd\nlong  x\n");
        assert_eq!(table(&["ID"], &[]), "ID\n");
        assert_eq!(table(&["N"], &[vec!["\u{1b}[2J".to_owned()]]), "N\n\\u{1b}[2J\n");
    }

    #[test]
    fn numbers_are_as_people_say_them() {
        let texts = [0, 1023, 1024, 1536, 20 << 20, 3 << 40].map(bytes);
        assert_eq!(texts, ["0 B", "1023 B", "1 KiB", "1.5 KiB", "20 MiB", "3 TiB"]);
        assert_eq!(
            [1, 119, 120, 7200, 172_800].map(ago).join(","),
            "1 second ago,119 seconds ago,2 minutes ago,2 hours ago,2 days ago"
        );
    }
}
