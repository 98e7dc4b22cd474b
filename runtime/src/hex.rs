//! Lower-case hex: how digests are written, and names that nobody else has.

use crate::failure::{Context, Failure};

/// Two digits a byte.
pub fn hex<'a>(bytes: impl IntoIterator<Item = &'a u8>) -> String {
    bytes.into_iter().map(|byte| format!("{byte:02x}")).collect()
}

/// A name of `N` random bytes.
///
/// # Errors
/// The host has none.
pub fn random<const N: usize>() -> Result<String, Failure> {
    let mut bytes = [0; N];
    mvm_devices::sys::random(&mut bytes).context(|| "cannot get random bytes".to_owned())?;
    Ok(hex(&bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_byte_is_two_digits_and_names_differ() {
        assert_eq!(hex(&[0, 0x0a, 0xff]), "000aff");
        let names = [random::<6>().unwrap(), random::<6>().unwrap()];
        assert!(names.iter().all(|name| name.len() == 12) && names[0] != names[1], "{names:?}");
    }
}
