//! Which of the memory it went on with a machine has touched: recorded, so that it can be brought in for those after it.

use std::fs::File;
use std::io;
use std::path::Path;

use mvm_vmm::control::{Answer, Request};
use mvm_vmm::snapshot::{Needed, Recorded, record};

use super::control::Control;
use crate::failure::{Context, Failure};
use crate::whole_file::write_whole;

/// The name of such a record beside the files of a saved machine.
pub(crate) const WORKING_SET: &str = "working-set";

impl Control {
    /// Records in a file at `path`, which is replaced, what the machine has needed since it went on. `pid` is its process.
    ///
    /// Its map of pages is read here: to whom that is open it may tell more than a machine's process is to know.
    ///
    /// # Errors
    /// It did not go on from a snapshot, nobody may look into its process, or the file cannot be written.
    pub fn record_working_set(&self, pid: i32, needed: Needed, path: &Path) -> Result<Recorded, Failure> {
        let failed = || format!("cannot record which memory machine {} needs", self.id());
        let map = match self.call(&Request::MemoryMap, &[]) {
            Ok(Answer::MemoryMap(map)) => Ok(map),
            Ok(other) => Err(io::Error::other(format!("the answer is no map: {other:?}"))),
            Err(error) => Err(error),
        };
        let (map, pages) = (map.context(failed)?, format!("/proc/{pid}/pagemap"));
        let pages = File::open(&pages).context(|| format!("cannot open {pages}")).context(failed)?;
        let mut recorded = Recorded::default();
        let written = write_whole(path, |file| {
            recorded = record(&pages, &map, needed, file).context(failed)?;
            Ok(())
        });
        written.map(|()| recorded)
    }
}
