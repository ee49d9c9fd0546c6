//! Values of keys: from TOML to the types of a configuration.

use super::{ByteSize, IpPrefix};
use std::net::{IpAddr, SocketAddr};
use std::ops::Range;
use std::path::PathBuf;
use toml::Spanned;
use toml::de::DeValue;

/// Why a value was refused.
#[derive(Debug)]
pub struct Refused {
    pub(super) span: Range<usize>,
    /// Which item of an array, from 1.
    pub(super) index: Option<usize>,
    pub(super) message: String,
    pub(super) remedy: String,
}

/// A type that can be the value of a key.
pub trait FromToml: Sized {
    /// The value, or `None` with the reasons pushed to `refused`.
    fn read(value: &Spanned<DeValue<'_>>, refused: &mut Vec<Refused>) -> Option<Self>;
}

fn refuse<T>(
    value: &Spanned<DeValue<'_>>,
    refused: &mut Vec<Refused>,
    message: String,
    remedy: impl Into<String>,
) -> Option<T> {
    refused.push(Refused {
        span: value.span(),
        index: None,
        message,
        remedy: remedy.into(),
    });
    None
}

fn is_a(value: &Spanned<DeValue<'_>>) -> String {
    format!("is {}", type_name(value.get_ref()))
}

impl FromToml for String {
    fn read(value: &Spanned<DeValue<'_>>, refused: &mut Vec<Refused>) -> Option<Self> {
        match value.get_ref() {
            DeValue::String(s) => Some(s.to_string()),
            _ => refuse(value, refused, is_a(value), "write a string in quotes"),
        }
    }
}

impl FromToml for PathBuf {
    fn read(value: &Spanned<DeValue<'_>>, refused: &mut Vec<Refused>) -> Option<Self> {
        let path = String::read(value, refused)?;
        if path.is_empty() || path.contains('\0') {
            return refuse(
                value,
                refused,
                "is not a path".to_owned(),
                "name a file or directory",
            );
        }
        Some(path.into())
    }
}

impl FromToml for bool {
    fn read(value: &Spanned<DeValue<'_>>, refused: &mut Vec<Refused>) -> Option<Self> {
        match value.get_ref() {
            DeValue::Boolean(b) => Some(*b),
            _ => refuse(value, refused, is_a(value), "write true or false"),
        }
    }
}

impl FromToml for u64 {
    fn read(value: &Spanned<DeValue<'_>>, refused: &mut Vec<Refused>) -> Option<Self> {
        let DeValue::Integer(n) = value.get_ref() else {
            return refuse(value, refused, is_a(value), "write a whole number");
        };
        match u64::from_str_radix(n.as_str(), n.radix()) {
            Ok(n) => Some(n),
            Err(_) => refuse(
                value,
                refused,
                format!("{} is out of range", n.as_str()),
                "write a whole number from 0 on",
            ),
        }
    }
}

/// Reads a string and parses it.
fn parsed<T: std::str::FromStr>(
    value: &Spanned<DeValue<'_>>,
    refused: &mut Vec<Refused>,
    what: &str,
    example: &str,
) -> Option<T> {
    let text = String::read(value, refused)?;
    match text.parse() {
        Ok(parsed) => Some(parsed),
        Err(_) => refuse(
            value,
            refused,
            format!("`{text}` is not {what}"),
            format!("write it like {example}"),
        ),
    }
}

impl FromToml for SocketAddr {
    fn read(value: &Spanned<DeValue<'_>>, refused: &mut Vec<Refused>) -> Option<Self> {
        let what = "an IP address with a port";
        parsed(
            value,
            refused,
            what,
            "\"10.1.0.11:7400\" or \"[fd00::b]:7400\"",
        )
    }
}

impl FromToml for IpAddr {
    fn read(value: &Spanned<DeValue<'_>>, refused: &mut Vec<Refused>) -> Option<Self> {
        parsed(value, refused, "an IP address", "\"10.1.0.11\"")
    }
}

impl FromToml for IpPrefix {
    fn read(value: &Spanned<DeValue<'_>>, refused: &mut Vec<Refused>) -> Option<Self> {
        let text = String::read(value, refused)?;
        match text.parse() {
            Ok(prefix) => Some(prefix),
            Err(error) => refuse(
                value,
                refused,
                format!("`{text}`: {error}"),
                "write the network and its length, like \"10.1.0.0/16\"",
            ),
        }
    }
}

impl FromToml for ByteSize {
    fn read(value: &Spanned<DeValue<'_>>, refused: &mut Vec<Refused>) -> Option<Self> {
        if let DeValue::Integer(_) = value.get_ref() {
            return u64::read(value, refused).map(ByteSize);
        }
        parsed(value, refused, "a size", "\"256 MiB\" or a number of bytes")
    }
}

impl<T: FromToml> FromToml for Vec<T> {
    fn read(value: &Spanned<DeValue<'_>>, refused: &mut Vec<Refused>) -> Option<Self> {
        let DeValue::Array(array) = value.get_ref() else {
            return refuse(value, refused, is_a(value), "write an array in [ ]");
        };
        let mut items = Vec::with_capacity(array.len());
        let mut whole = true;
        for (i, item) in array.iter().enumerate() {
            let before = refused.len();
            match T::read(item, refused) {
                Some(item) => items.push(item),
                None => whole = false,
            }
            for wrong in &mut refused[before..] {
                wrong.index.get_or_insert(i + 1);
            }
        }
        whole.then_some(items)
    }
}

/// What a value is, for messages.
pub(super) fn type_name(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "an array",
        DeValue::Table(_) => "a table",
    }
}
