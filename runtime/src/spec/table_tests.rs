//! The table of the documentation, fed to this module row by row.
