//! Medians, and how sure they are.

use serde_json::{Value, json};

/// Resamples of a bootstrap.
const RESAMPLES: usize = 2000;

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

/// Bounds of the median by bootstrap, 95 of 100 times; the same for the same values. NaN of nothing.
pub fn interval(values: &[f64]) -> (f64, f64) {
    if values.is_empty() {
        return (f64::NAN, f64::NAN);
    }
    let mut state = 1u64;
    let mut medians: Vec<f64> = (0..RESAMPLES)
        .map(|_| {
            let sample: Vec<f64> = values.iter().map(|_| values[draw(&mut state, values.len())]).collect();
            median(&sample)
        })
        .collect();
    medians.sort_by(f64::total_cmp);
    (medians[RESAMPLES * 25 / 1000], medians[RESAMPLES * 975 / 1000 - 1])
}

/// A number below `bound` from a linear congruential generator: repeatable, which is all that is asked here.
fn draw(state: &mut u64, bound: usize) -> usize {
    *state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    usize::try_from(*state >> 33).unwrap_or(0) % bound
}

/// Values measured in pairs.
#[derive(Clone, Debug, Default)]
pub struct Pairs(Vec<(f64, f64)>);

impl Pairs {
    /// Adds a pair: ours and the peer's.
    pub fn add(&mut self, ours: f64, peer: f64) {
        self.0.push((ours, peer));
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Median of the pairs' ratios.
    pub fn ratio(&self) -> f64 {
        median(&self.ratios())
    }

    /// Medians of ours and of the peer's.
    pub fn medians(&self) -> (f64, f64) {
        let column = |pick: fn(&(f64, f64)) -> f64| median(&self.0.iter().map(pick).collect::<Vec<_>>());
        (column(|pair| pair.0), column(|pair| pair.1))
    }

    /// Bounds of the ratio, 95 of 100 times.
    pub fn interval(&self) -> (f64, f64) {
        interval(&self.ratios())
    }

    /// A row of the interval, then a row per pair.
    pub fn rows(&self, ours: &str, peer: &str) -> Vec<Value> {
        let (low, high) = self.interval();
        let mut rows = vec![json!({"median_ratio_low": low, "median_ratio_high": high, "confidence": 0.95})];
        rows.extend(self.0.iter().map(|pair| json!({ours: pair.0, peer: pair.1})));
        rows
    }

    fn ratios(&self) -> Vec<f64> {
        self.0.iter().map(|(ours, peer)| ours / peer).collect()
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
    fn an_interval_holds_the_median_and_leaves_the_outlier_out() {
        let values = [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7, 1.8, 90.0];
        let (low, high) = interval(&values);
        assert!(low <= median(&values) && median(&values) <= high, "{low} {high}");
        assert!(low > 1.0 && high < 90.0, "{low} {high}");
    }

    #[test]
    fn a_ratio_is_of_each_pair_not_of_the_medians() {
        let mut pairs = Pairs::default();
        for (ours, peer) in [(1.0, 2.0), (10.0, 20.0), (5.0, 1.0)] {
            pairs.add(ours, peer);
        }
        assert!((pairs.ratio() - 0.5).abs() < 1e-9);
        assert_eq!(pairs.rows("a", "b").len(), 4);
    }
}
