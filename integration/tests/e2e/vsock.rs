//! vsock beside the agent: any program of the guest, any program of the host.

use crate::Test;

pub(crate) const TESTS: &[Test] = &[];
