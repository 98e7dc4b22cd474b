//! What the image tests judge with: a reader written from the format's description alone.

pub(crate) mod erofs_reader;
