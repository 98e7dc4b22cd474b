//! What the benches print and keep.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::stats::Pairs;

/// One figure.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// Stable name.
    pub id: String,
    /// What was measured.
    pub value: f64,
    /// In what.
    pub unit: String,
    /// Bounds of the value, 95 of 100 times; of ratios of pairs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interval: Option<(f64, f64)>,
    /// How, in one sentence.
    pub method: String,
    /// The same of others in the same run.
    pub peers: BTreeMap<String, f64>,
    /// Every row the figure was made of.
    pub raw: Vec<Value>,
}

impl Figure {
    /// A figure without peers and rows.
    pub fn new(id: &str, value: f64, unit: &str, method: &str) -> Self {
        Self {
            id: id.to_owned(),
            value,
            unit: unit.to_owned(),
            interval: None,
            method: method.to_owned(),
            peers: BTreeMap::new(),
            raw: Vec::new(),
        }
    }

    /// The median ratio of pairs with its bounds; the columns' medians are its peers, the pairs its rows.
    pub fn ratio(id: &str, pairs: &Pairs, [ours, peer]: [&str; 2], method: &str) -> Self {
        let (of_ours, of_peer) = pairs.medians();
        let figure = Self { interval: Some(pairs.interval()), ..Self::new(id, pairs.ratio(), "x", method) };
        figure.peer(ours, of_ours).peer(peer, of_peer).raw(pairs.rows(ours, peer))
    }

    /// Adds a peer's value.
    #[must_use]
    pub fn peer(mut self, name: &str, value: f64) -> Self {
        self.peers.insert(name.to_owned(), value);
        self
    }

    /// Sets the rows.
    #[must_use]
    pub fn raw(mut self, rows: impl IntoIterator<Item = Value>) -> Self {
        self.raw = rows.into_iter().collect();
        self
    }
}

/// Figures of one run.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Report(pub Vec<Figure>);

impl Report {
    /// The table for people: a line per figure, then how each was measured.
    pub fn table(&self) -> String {
        let mut text = format!("{:<33} {:>12} {:<6} {:<15} peers\n", "figure", "value", "unit", "95 of 100");
        for figure in &self.0 {
            let peers: Vec<_> =
                figure.peers.iter().map(|(name, value)| format!("{name} {}", short(*value))).collect();
            let bounds = figure
                .interval
                .map(|(low, high)| format!("{} to {}", short(low), short(high)))
                .unwrap_or_default();
            let line = format!(
                "{:<33} {:>12} {:<6} {bounds:<15} {}",
                figure.id,
                short(figure.value),
                figure.unit,
                peers.join(", ")
            );
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text.push_str("\nhow:\n");
        for figure in &self.0 {
            text.push_str(&format!("  {}: {} ({} rows)\n", figure.id, figure.method, figure.raw.len()));
        }
        text
    }

    /// Writes everything, raw rows included, as JSON.
    ///
    /// # Errors
    /// The host's reason.
    pub fn write(&self, path: &Path) -> io::Result<()> {
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir)?;
        }
        fs::write(path, serde_json::to_string_pretty(self).map_err(io::Error::other)?)
    }
}

/// Four significant digits or so.
fn short(value: f64) -> String {
    let digits = match value.abs() {
        v if v >= 1000.0 => 0,
        v if v >= 100.0 => 1,
        v if v >= 10.0 => 2,
        _ => 3,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_names_every_figure_its_peers_and_its_method() {
        let mut pairs = Pairs::default();
        [(1.0, 2.0), (3.0, 4.0), (2.0, 8.0)].into_iter().for_each(|(ours, peer)| pairs.add(ours, peer));
        let report = Report(vec![
            Figure::new("native.teardown_ms", 0.21, "ms", "median of 20 ends").peer("floor", 0.15),
            Figure::ratio("lab.exec_over_runc", &pairs, ["mvm_ms", "runc_ms"], "median of 3 pairs"),
        ]);
        let table = report.table();
        assert!(table.contains("native.teardown_ms"));
        assert!(table.contains("0.210 ms"));
        assert!(table.contains("floor 0.150"));
        assert!(table.contains("median of 20 ends (0 rows)"));
        assert!(table.contains("0.500 x      0.250 to 0.750"), "{table}");
        assert!(
            table.contains("mvm_ms 2.000, runc_ms 4.000") && table.contains("median of 3 pairs (4 rows)")
        );
    }
}
