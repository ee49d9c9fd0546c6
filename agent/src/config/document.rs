//! Reading a TOML file so that *every* mistake in it is reported at once,
//! each with its line, its key and what to do about it.
//!
//! `serde` stops at the first error and knows no remedy; operators fix a file
//! once, not once per mistake. So configuration, plans and the like are walked
//! by hand over `toml`'s spanned tree: ask a [`Section`] for its keys, then
//! [`Section::finish`] it, which refuses whatever was not asked for.

use std::cell::RefCell;
use std::fmt;
use std::ops::Range;
use std::path::{Path, PathBuf};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::value::{FromToml, type_name};

/// One mistake in a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problem {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The key at fault, with its tables: `peer[2].address`. Empty when the
    /// file as a whole is at fault.
    pub key: String,
    /// What is wrong.
    pub message: String,
    /// What to do about it.
    pub remedy: String,
}

/// All mistakes of one file, in the order of its lines.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Problems {
    /// The file, as the operator named it.
    pub file: PathBuf,
    /// At least one.
    pub problems: Vec<Problem>,
}

impl Problems {
    /// A file that is wrong as a whole, for instance because it cannot be read.
    pub fn whole(file: &Path, message: impl Into<String>, remedy: impl Into<String>) -> Self {
        Problems {
            file: file.to_owned(),
            problems: vec![Problem {
                line: 1,
                column: 1,
                key: String::new(),
                message: message.into(),
                remedy: remedy.into(),
            }],
        }
    }
}

impl fmt::Display for Problems {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, p) in self.problems.iter().enumerate() {
            if i > 0 {
                writeln!(f)?;
            }
            let file = self.file.display();
            write!(f, "{file}:{}:{}: ", p.line, p.column)?;
            if !p.key.is_empty() {
                write!(f, "{}: ", p.key)?;
            }
            write!(f, "{}", p.message)?;
            if !p.remedy.is_empty() {
                write!(f, "\n    {}", p.remedy)?;
            }
        }
        Ok(())
    }
}

impl std::error::Error for Problems {}

/// A file being read, and the problems found in it so far.
#[derive(Debug)]
pub struct Document<'i> {
    file: PathBuf,
    text: &'i str,
    root: Spanned<DeTable<'i>>,
    problems: RefCell<Vec<(usize, Problem)>>,
}

impl<'i> Document<'i> {
    /// Parses `text`. Syntax errors become problems; what could be read
    /// around them is still there to be checked.
    pub fn parse(file: &Path, text: &'i str) -> Self {
        let (root, errors) = DeTable::parse_recoverable(text);
        let document = Document {
            file: file.to_owned(),
            text,
            root,
            problems: RefCell::default(),
        };
        for error in errors {
            document.complain(
                error.span().unwrap_or(0..0),
                String::new(),
                format!("not valid TOML: {}", error.message()),
                "see https://toml.io for the syntax".to_owned(),
            );
        }
        document
    }

    /// The top of the file.
    pub fn root(&self) -> Section<'_, 'i> {
        Section {
            document: self,
            table: self.root.get_ref(),
            path: String::new(),
            span: 0..0,
            known: RefCell::default(),
        }
    }

    /// `value` if no problem was found, else all of them by line. `value` may
    /// be `None` only when a problem was found; if not, that is reported too.
    pub fn finish<T>(self, value: Option<T>) -> Result<T, Problems> {
        let mut problems = self.problems.into_inner();
        match value {
            Some(value) if problems.is_empty() => Ok(value),
            None if problems.is_empty() => Err(Problems::whole(
                &self.file,
                "the file is incomplete",
                "compare it with the commented example in configs/",
            )),
            _ => {
                problems.sort_by_key(|(at, _)| *at);
                Err(Problems {
                    file: self.file,
                    problems: problems.into_iter().map(|(_, p)| p).collect(),
                })
            }
        }
    }

    fn complain(&self, at: Range<usize>, key: String, message: String, remedy: String) {
        let (line, column) = line_column(self.text, at.start);
        self.problems.borrow_mut().push((
            at.start,
            Problem {
                line,
                column,
                key,
                message,
                remedy,
            },
        ));
    }
}

/// Line and column (characters, both from 1) of byte `at`.
fn line_column(text: &str, at: usize) -> (usize, usize) {
    let mut at = at.min(text.len());
    while !text.is_char_boundary(at) {
        at -= 1;
    }
    let before = &text[..at];
    let line = before.matches('\n').count() + 1;
    let start = before.rfind('\n').map_or(0, |n| n + 1);
    (line, before[start..].chars().count() + 1)
}

/// One table of a [`Document`].
#[derive(Debug)]
pub struct Section<'d, 'i> {
    document: &'d Document<'i>,
    table: &'d DeTable<'i>,
    path: String,
    span: Range<usize>,
    known: RefCell<Vec<&'static str>>,
}

impl<'d, 'i> Section<'d, 'i> {
    /// The value of `key`; a missing key is a problem with `remedy`.
    pub fn required<T: FromToml>(&self, key: &'static str, remedy: &str) -> Option<T> {
        if self.has(key) {
            return self.optional(key);
        }
        self.document.complain(
            self.span.clone(),
            self.name_of(key),
            "this key is missing".to_owned(),
            remedy.to_owned(),
        );
        None
    }

    /// The value of `key`, if it is there and right.
    pub fn optional<T: FromToml>(&self, key: &'static str) -> Option<T> {
        let value = self.get(key)?;
        let mut refused = Vec::new();
        let read = T::read(value, &mut refused);
        for wrong in refused {
            let index: String = wrong.index.map(|i| format!("[{i}]")).unwrap_or_default();
            self.document.complain(
                wrong.span,
                self.name_of(key) + &index,
                wrong.message,
                wrong.remedy,
            );
        }
        read
    }

    /// The value of `key`, or `default` if it is not there.
    pub fn or<T: FromToml>(&self, key: &'static str, default: T) -> T {
        self.optional(key).unwrap_or(default)
    }

    /// Whether the key is there at all.
    pub fn has(&self, key: &'static str) -> bool {
        self.get(key).is_some()
    }

    /// The table `key`, if it is there.
    pub fn section(&self, key: &'static str) -> Option<Section<'d, 'i>> {
        let value = self.get(key)?;
        let DeValue::Table(table) = value.get_ref() else {
            self.wrong_type(key, value, &format!("a table, written [{}]", key));
            return None;
        };
        Some(self.inner(table, self.name_of(key), value.span()))
    }

    /// The tables of an array of tables, `[[key]]`; empty if it is not there.
    pub fn sections(&self, key: &'static str) -> Vec<Section<'d, 'i>> {
        let Some(value) = self.get(key) else {
            return Vec::new();
        };
        let expected = format!("tables, each written [[{key}]]");
        let DeValue::Array(array) = value.get_ref() else {
            self.wrong_type(key, value, &expected);
            return Vec::new();
        };
        let mut sections = Vec::new();
        for (i, item) in array.iter().enumerate() {
            match item.get_ref() {
                DeValue::Table(table) => sections.push(self.inner(
                    table,
                    format!("{}[{}]", self.name_of(key), i + 1),
                    item.span(),
                )),
                _ => self.wrong_type(key, item, &expected),
            }
        }
        sections
    }

    /// Every key of this table with a string value: for tables whose keys the
    /// operator makes up. Values of other types are problems.
    pub fn strings(&self) -> Vec<(String, String)> {
        let mut strings = Vec::new();
        for (key, value) in self.table.iter() {
            match value.get_ref() {
                DeValue::String(s) => strings.push((key.get_ref().to_string(), s.to_string())),
                _ => self.document.complain(
                    value.span(),
                    self.name_of(key.get_ref()),
                    format!("is {}", type_name(value.get_ref())),
                    "write a string in quotes".to_owned(),
                ),
            }
        }
        strings
    }

    /// Reports that the value of `key` is wrong (or the key itself, if it has
    /// no value).
    pub fn complain(&self, key: &str, message: impl Into<String>, remedy: impl Into<String>) {
        let span = self.table.get(key).map_or(self.span.clone(), Spanned::span);
        self.document
            .complain(span, self.name_of(key), message.into(), remedy.into());
    }

    /// Reports item `index` (from 0) of the array `key`.
    pub fn complain_item(
        &self,
        key: &str,
        index: usize,
        message: impl Into<String>,
        remedy: impl Into<String>,
    ) {
        let item = self.table.get(key).and_then(|value| {
            let array = value.get_ref().as_array()?;
            array.get(index).map(Spanned::span)
        });
        self.document.complain(
            item.unwrap_or(self.span.clone()),
            format!("{}[{}]", self.name_of(key), index + 1),
            message.into(),
            remedy.into(),
        );
    }

    /// Ends the reading of this table: every key that was not asked for is a
    /// problem.
    pub fn finish(self) {
        let known = self.known.borrow();
        for (key, _) in self.table.iter() {
            let name: &str = key.get_ref();
            if known.contains(&name) {
                continue;
            }
            let remedy = match closest(name, &known) {
                Some(near) => format!("did you mean `{near}`?"),
                None => format!("known keys here: {}", sorted(&known).join(", ")),
            };
            self.document.complain(
                key.span(),
                self.name_of(name),
                "unknown key".to_owned(),
                remedy,
            );
        }
    }

    fn get(&self, key: &'static str) -> Option<&'d Spanned<DeValue<'i>>> {
        if !self.known.borrow().contains(&key) {
            self.known.borrow_mut().push(key);
        }
        self.table.get(key)
    }

    fn inner(&self, table: &'d DeTable<'i>, path: String, span: Range<usize>) -> Section<'d, 'i> {
        Section {
            document: self.document,
            table,
            path,
            span,
            known: RefCell::default(),
        }
    }

    fn name_of(&self, key: &str) -> String {
        if self.path.is_empty() {
            key.to_owned()
        } else {
            format!("{}.{key}", self.path)
        }
    }

    fn wrong_type(&self, key: &str, value: &Spanned<DeValue<'i>>, expected: &str) {
        self.document.complain(
            value.span(),
            self.name_of(key),
            format!("is {}", type_name(value.get_ref())),
            format!("expected {expected}"),
        );
    }
}

fn sorted<'a>(keys: &[&'a str]) -> Vec<&'a str> {
    let mut keys = keys.to_vec();
    keys.sort_unstable();
    keys
}

/// The known word an operator most likely meant, if any is near.
pub fn closest<'a>(word: &str, known: &[&'a str]) -> Option<&'a str> {
    known
        .iter()
        .map(|k| (strsim::jaro_winkler(word, k), *k))
        .filter(|(near, _)| *near > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, k)| k)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::SocketAddr;

    #[test]
    fn columns_count_characters_not_bytes() {
        assert_eq!(line_column("ä = 1\nöö = 2", 7), (2, 1));
        assert_eq!(line_column("ä = 1\nöö = 2", 11), (2, 3));
        assert_eq!(line_column("x", 99), (1, 2));
    }

    #[test]
    fn every_problem_is_reported_with_its_place() {
        let text = "nmae = \"a\"\nport = \"x\"\n[[peer]]\naddress = [1]\n";
        let document = Document::parse(Path::new("f.toml"), text);
        let root = document.root();
        let name: Option<String> = root.required("name", "add a name");
        let port: Option<u64> = root.optional("port");
        let peer = root.sections("peer").remove(0);
        let address: Option<SocketAddr> = peer.required("address", "");
        peer.finish();
        root.finish();
        assert_eq!((name, port, address), (None, None, None));
        let problems = document.finish::<()>(None).unwrap_err();
        assert_eq!(
            problems.to_string(),
            "f.toml:1:1: name: this key is missing\n    add a name\n\
             f.toml:1:1: nmae: unknown key\n    did you mean `name`?\n\
             f.toml:2:8: port: is a string\n    write a whole number\n\
             f.toml:4:11: peer[1].address: is an array\n    write a string in quotes"
        );
    }
}
