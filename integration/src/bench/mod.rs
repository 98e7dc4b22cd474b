//! The figures: each a ratio in one run, or virtual time in the deterministic lab, with its raw rows.

pub mod report;

pub use report::{Figure, Report};

/// Every figure's stable name, in the order of the report.
pub const IDS: &[&str] = &[
    "native.start_over_floor",
    "native.start_over_qemu",
    "native.memory_per_vm_kb",
    "native.starts_per_s",
    "native.teardown_ms",
    "lab.agent_ready_ms",
    "lab.blk_read_4k_us",
    "lab.blk_read_4k_over_qemu",
    "lab.blk_read_1m_mbs",
    "lab.blk_read_1m_over_qemu",
    "lab.net_rtt_us",
    "lab.net_stream_mbs",
    "lab.vsock_rtt_us",
    "lab.vsock_stream_mbs",
    "lab.vm_memory_mb",
];

/// Which figures are wanted.
#[derive(Clone, Debug, Default)]
pub struct Wanted(Option<Vec<String>>);

impl Wanted {
    /// All, or those of a comma-separated list.
    ///
    /// # Errors
    /// The first name that is no figure's.
    pub fn parse(list: Option<&str>) -> Result<Self, String> {
        let Some(list) = list else { return Ok(Self(None)) };
        let names: Vec<_> = list.split(',').map(str::to_owned).collect();
        match names.iter().find(|name| !IDS.contains(&name.as_str())) {
            None => Ok(Self(Some(names))),
            Some(name) => Err(format!("{name} is no figure; there are: {}", IDS.join(" "))),
        }
    }

    /// Whether the figure `id` is wanted.
    pub fn has(&self, id: &str) -> bool {
        self.0.as_ref().is_none_or(|names| names.iter().any(|name| name == id))
    }

    /// Whether any figure whose name begins with `prefix` is wanted.
    pub fn any(&self, prefix: &str) -> bool {
        IDS.iter().any(|id| id.starts_with(prefix) && self.has(id))
    }
}

/// The middle value; the mean of the two middle ones of an even number. NaN of nothing.
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        n if n % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_of_any_number_of_values() {
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
        assert!(median(&[]).is_nan());
    }

    #[test]
    fn unknown_figures_are_refused_by_name() {
        assert!(Wanted::parse(Some("native.speed")).unwrap_err().contains("native.speed"));
        let some = Wanted::parse(Some("lab.net_rtt_us,native.teardown_ms")).unwrap();
        assert!(some.has("lab.net_rtt_us") && !some.has("lab.vm_memory_mb"));
        assert!(some.any("native.") && !some.any("lab.blk"));
    }
}
