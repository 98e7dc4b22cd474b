//! What the image tests are made of, and what they judge with.

#![allow(dead_code)] // each test program uses a part

pub(crate) mod erofs_reader;
pub(crate) mod images;
