//! Fuzz targets: each reads bytes as an enemy may have made them, says what they reached, and panics where something
//! happened that must not.
//!
//! What drives them is libFuzzer (`src/main.rs`) or, seed by seed, a test. A target declares what its seeds
//! must reach, so that none is green because it gets nowhere.

mod alloc;
mod targets;

pub use mvm_devices::testing::hostile::Reach;
pub use targets::all;

/// Most bytes an input may have.
pub const MAX_INPUT: usize = 16 * 1024;

/// One target.
#[derive(Clone, Copy)]
pub struct Target {
    /// What it is called.
    pub name: &'static str,
    /// Takes an input.
    pub run: fn(&[u8], &mut Reach),
    /// Inputs to begin with.
    pub seeds: fn() -> Vec<Vec<u8>>,
    /// Counters that the seeds must make more than 0.
    pub reaches: &'static [&'static str],
    /// Most MiB that an input may have allocated at a time.
    pub most_mib: usize,
}

impl Target {
    /// Runs one input; what it reached.
    ///
    /// # Panics
    /// Something happened that must not, or more was allocated than may be.
    pub fn once(&self, bytes: &[u8]) -> Reach {
        let mut reach = Reach::default();
        let before = alloc::begin();
        (self.run)(bytes, &mut reach);
        let most = alloc::most_since(before);
        assert!(most <= self.most_mib << 20, "{} allocated {most} bytes", self.name);
        reach
    }
}

/// The target called `name`.
pub fn named(name: &str) -> Option<Target> {
    all().into_iter().find(|target| target.name == name)
}
