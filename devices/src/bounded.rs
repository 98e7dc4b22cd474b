//! Lists of a saved state, which are never longer than what they describe can be.
//!
//! A state comes from anywhere, and compact formats let an element of many bytes in memory be a single byte of the
//! file. So a list says how long it can be, and one that is longer is refused before it is there.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, SeqAccess, Visitor};

/// Reads a list of at most `MAX` elements: for `#[serde(deserialize_with = …)]`.
///
/// # Errors
/// It has more, or an element cannot be read.
pub fn list<'de, D, T, const MAX: usize>(from: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    from.deserialize_seq(List::<T, MAX>(PhantomData))
}

/// As [`list`], for one that may not be there.
///
/// # Errors
/// As [`list`].
pub fn optional_list<'de, D, T, const MAX: usize>(from: D) -> Result<Option<Vec<T>>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    Ok(Option::<Bounded<T, MAX>>::deserialize(from)?.map(|list| list.0))
}

struct Bounded<T, const MAX: usize>(Vec<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Deserialize<'de> for Bounded<T, MAX> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        list::<D, T, MAX>(from).map(Self)
    }
}

struct List<T, const MAX: usize>(PhantomData<T>);

impl<'de, T: Deserialize<'de>, const MAX: usize> Visitor<'de> for List<T, MAX> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "at most {MAX} elements")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut from: A) -> Result<Vec<T>, A::Error> {
        let mut list = Vec::new();
        while let Some(element) = from.next_element()? {
            if list.len() >= MAX {
                return Err(Error::invalid_length(list.len().saturating_add(1), &self));
            }
            list.push(element);
        }
        Ok(list)
    }
}

#[cfg(test)]
mod tests {
    use serde::Deserialize;

    #[derive(Debug, PartialEq, Deserialize)]
    struct Lists {
        #[serde(deserialize_with = "super::list::<_, _, 2>")]
        one: Vec<u8>,
        #[serde(deserialize_with = "super::optional_list::<_, _, 3>")]
        other: Option<Vec<u8>>,
    }

    #[test]
    fn a_list_is_read_up_to_its_bound_and_refused_beyond() {
        let read = |text: &str| serde_json::from_str::<Lists>(text);
        let whole = Lists { one: vec![1, 2], other: Some(vec![3, 4, 5]) };
        assert_eq!(read(r#"{"one":[1,2],"other":[3,4,5]}"#).unwrap(), whole);
        assert_eq!(read(r#"{"one":[],"other":null}"#).unwrap(), Lists { one: vec![], other: None });
        let error = read(r#"{"one":[1,2,3],"other":null}"#).unwrap_err().to_string();
        assert!(error.contains("at most 2 elements"), "{error}");
        assert!(read(r#"{"one":[],"other":[1,2,3,4]}"#).is_err());
    }
}
